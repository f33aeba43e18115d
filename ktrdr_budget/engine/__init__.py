"""The engine of the limiters: protocol, replica state, calls, outage policies, batching, transport, embedded server."""
