"""Benchmarks of the package beside its peers, on servers that the run starts itself: `python -m benchmarks`."""
