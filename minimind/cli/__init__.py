"""Command-line interface: one file per command; heavy imports stay inside the commands."""
