"""Long versions of the reliability tests."""
