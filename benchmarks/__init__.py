"""Scripts that measure what the documentation claims; records lie in `records/`."""
