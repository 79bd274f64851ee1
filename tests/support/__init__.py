"""Helpers shared by tests and benchmarks: tiny models, stand-in services, child processes."""
