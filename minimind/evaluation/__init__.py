"""What a model can do, in figures: the quiz, and reports with plots."""
