"""The protocol with the store: typed requests, replies and hold records. No other package knows the wire format."""
