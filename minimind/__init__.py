"""minimind: train a small GPT from zero on your own computer."""

__version__ = "0.1.0"
