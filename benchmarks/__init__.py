"""Scripts for the measurements in the documentation; their records are in `records/`."""
