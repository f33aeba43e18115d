"""Waits until what a batch wrote is where the store will not lose it: on a replica, or on disk (P13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from ktrdr_budget.engine.transport.errors import Transient
from ktrdr_budget.errors import InvalidArgument, StoreError, shown

if TYPE_CHECKING:
    from ktrdr_budget.engine.transport.node import Node

__all__ = ["Durability", "check_durability", "confirmed"]

Durability = Literal["memory", "replica", "disk"]
_LATE_S = 0.15
"""A server looks ten times a second whether somebody has waited for long enough."""
_MISSING = {"replica": "no replica has confirmed it", "disk": "it is not on disk yet"}


def check_durability(value: object) -> None:
    """Raises :class:`~ktrdr_budget.errors.InvalidArgument` if it is no :data:`Durability`."""
    if value not in get_args(Durability):
        raise InvalidArgument(f"durability must be 'memory', 'replica' or 'disk', not {shown(value)}")


async def confirmed(
    server: Node, words: Sequence[Any], asking: bool, durability: Durability, meta: str, within_s: float, shown: str
) -> Any:
    """The answer to a batch, once what it wrote is safe.

    Args:
        asking: whether a node of a cluster is asked for what another is moving to it.
        meta: the tenant's key of that name.
        within_s: for how long the store waits at most.

    Raises:
        Transient: it was executed, but is not safe within that time.
        StoreError: the store cannot tell; nothing was sent.
    """
    if not server.confirms:
        try:
            await server.client.execute_command(*(("WAIT", 0, 1) if durability == "replica" else ("WAITAOF", 1, 0, 1)))
        except Exception as error:
            _explain(error, shown)
            raise
        server.confirms = True
    wait_ms = max(1, int((within_s - min(_LATE_S, within_s / 2)) * 1000))
    wait = ("WAIT", 1, wait_ms) if durability == "replica" else ("WAITAOF", 1, 0, wait_ms)
    # A batch of replays writes nothing, and so there would be nothing to wait for: hence a write that changes nothing.
    commands: list[Sequence[Any]] = [words, ("HSET", meta, "confirmed", "1")]
    if asking:
        commands = [word for command in commands for word in (("ASKING",), command)]
    pipeline = server.client.pipeline(transaction=False)
    for command in (*commands, wait):
        pipeline.execute_command(*command)
    answers = await pipeline.execute(raise_on_error=False)
    answer, count = answers[1 if asking else 0], answers[-1]
    for told in (answer, count):
        if isinstance(told, Exception):
            raise told
    if (count[0] if isinstance(count, list) else count) < 1:
        raise Transient(f"store at {shown}: {_MISSING[durability]}", sent=True, answered=True)
    return answer


def _explain(error: Exception, shown: str) -> None:
    words = str(error).lower()
    if "unknown command" in words:
        raise StoreError(f"store at {shown}: durability 'disk' needs WAITAOF (Redis 7.2, Valkey)") from None
    if "appendonly" in words:
        raise StoreError(f"store at {shown}: durability 'disk' needs appendonly to be on") from None
