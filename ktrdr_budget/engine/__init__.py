"""The engine: keys, protocol and scripts (pure), the store (I/O), and the embedded server."""
