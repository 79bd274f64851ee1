"""Preparation of pretraining text."""
