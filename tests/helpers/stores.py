"""The connections of a limiter, for tests of the transport."""

from __future__ import annotations

from typing import Any

from ktrdr_budget import AsyncBudgetLimiter
from ktrdr_budget.engine.transport.store import Store

__all__ = ["current_port", "idle_connections", "own_connections", "store_of"]


def store_of(limiter: Any) -> Store:
    """The store of a limiter, sync or async."""
    store: Store = limiter.engine.store
    return store


def current_port(limiter: AsyncBudgetLimiter) -> int | None:
    """The port of the server that requests go to; ``None`` while it is being looked up."""
    node = store_of(limiter).node
    return None if node is None or node.address is None else node.address[1]


def own_connections(limiter: AsyncBudgetLimiter) -> list[Any]:
    """The open connections that the package has taken over from redis-py; none if batches use redis-py's client."""
    node = store_of(limiter).node
    return [] if node is None else list(node.connections.opened)


def idle_connections(limiter: AsyncBudgetLimiter) -> list[Any]:
    """The idle connections: those taken over from redis-py, and those of redis-py's client."""
    node = store_of(limiter).node
    assert node is not None
    return [*node.connections.idle, *node.client.connection_pool.idle]
