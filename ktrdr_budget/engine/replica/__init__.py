"""The state of one replica; no I/O."""
