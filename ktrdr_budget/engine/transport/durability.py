"""Wait until the server confirms that a batch's writes are on one of the server's replicas, or on disk (P13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from ktrdr_budget.engine.transport.errors import Transient
from ktrdr_budget.errors import InvalidArgument, StoreError, shown

if TYPE_CHECKING:
    from ktrdr_budget.engine.transport.node import Node

__all__ = ["Durability", "check_durability", "execute_durably"]

Durability = Literal["memory", "replica", "disk"]
_REPLY_MARGIN_S = 0.15
"""This much of a request's time is left for the reply. The reply may be late, because a server checks the timeouts of
blocked clients only ten times a second."""
_UNCONFIRMED = {"replica": "no replica has confirmed it", "disk": "it is not on disk yet"}


def check_durability(value: object) -> None:
    """Raise :class:`~ktrdr_budget.errors.InvalidArgument` if the value is not a :data:`Durability`."""
    if value not in get_args(Durability):
        raise InvalidArgument(f"durability must be 'memory', 'replica' or 'disk', not {shown(value)}")


async def execute_durably(
    node: Node, words: Sequence[Any], asking: bool, durability: Durability, meta: str, within_s: float, shown: str
) -> Any:
    """Send a batch, and return its reply once the writes of the batch are confirmed.

    Args:
        asking: whether to send ``ASKING`` first. A node that is importing the slot requires this.
        meta: the tenant's ``meta`` key.
        within_s: the longest wait, in seconds.

    Raises:
        Transient: the batch was executed, but its writes were not confirmed in time.
        StoreError: the store cannot confirm writes; nothing was sent.
    """
    if not node.durability_checked:
        try:
            await node.client.execute_command(*(("WAIT", 0, 1) if durability == "replica" else ("WAITAOF", 1, 0, 1)))
        except Exception as error:
            _raise_if_unsupported(error, shown)
            raise
        node.durability_checked = True
    wait_ms = max(1, int((within_s - min(_REPLY_MARGIN_S, within_s / 2)) * 1000))
    wait = ("WAIT", 1, wait_ms) if durability == "replica" else ("WAITAOF", 1, 0, wait_ms)
    # A batch of replays writes nothing, so WAIT would confirm nothing: hence a write that changes nothing.
    commands: list[Sequence[Any]] = [words, ("HSET", meta, "confirmed", "1")]
    if asking:
        commands = [word for command in commands for word in (("ASKING",), command)]
    pipeline = node.client.pipeline(transaction=False)
    for command in (*commands, wait):
        pipeline.execute_command(*command)
    replies = await pipeline.execute(raise_on_error=False)
    reply, confirmations = replies[1 if asking else 0], replies[-1]
    for each in (reply, confirmations):
        if isinstance(each, Exception):
            raise each
    if (confirmations[0] if isinstance(confirmations, list) else confirmations) < 1:
        raise Transient(f"store at {shown}: {_UNCONFIRMED[durability]}", sent=True, answered=True)
    return reply


def _raise_if_unsupported(error: Exception, shown: str) -> None:
    text = str(error).lower()
    if "unknown command" in text:
        raise StoreError(f"store at {shown}: durability 'disk' needs WAITAOF (Redis 7.2, Valkey)") from None
    if "appendonly" in text:
        raise StoreError(f"store at {shown}: durability 'disk' needs appendonly to be on") from None
