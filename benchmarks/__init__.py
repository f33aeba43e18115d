"""How fast it is, beside its peers, in one run on servers that the run starts itself: `python -m benchmarks`."""
