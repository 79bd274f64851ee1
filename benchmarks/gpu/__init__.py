"""Parts of `benchmarks/gpu_report.py`; each is a function of a `Context`."""
