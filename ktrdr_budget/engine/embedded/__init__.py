"""The embedded server: a private Valkey for the processes of one machine that share a data directory."""

from ktrdr_budget.engine.embedded.server import EmbeddedServer, EmbeddedServerError, find, start

__all__ = ["EmbeddedServer", "EmbeddedServerError", "find", "start"]
