"""One generator per call of the limiter: it yields operations and receives replies."""
