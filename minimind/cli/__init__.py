"""The command line: one file a verb; heavy imports stay inside the verb."""
