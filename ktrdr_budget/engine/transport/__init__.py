"""Connections to the store: URLs, credentials, discovery, failover, and the meaning of failures."""
