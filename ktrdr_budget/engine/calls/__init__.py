"""One generator per call of the limiter. Each generator yields operations and receives replies."""
