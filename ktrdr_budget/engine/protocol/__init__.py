"""The protocol with the store: requests, replies and hold records, typed; the only place that knows the wire."""
