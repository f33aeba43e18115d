"""Background work of a limiter without a store: the test lists the replies."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ktrdr_budget.engine.batching.background import Background
from ktrdr_budget.engine.protocol.batch import BatchHead
from ktrdr_budget.engine.protocol.operations import Operation
from ktrdr_budget.engine.protocol.replies import Reply
from ktrdr_budget.engine.protocol.requests import Read, ReadHead
from ktrdr_budget.engine.replica.state import ReplicaState

from .calls import NOW_US

LOST = "lost"
"""A reply to a batch: the store has lost data, and has executed nothing."""


class ScriptedBackground(Background):
    """Sends nothing: each request takes the next of :attr:`replies`, and raises it if it is an exception.

    The reply to a batch is a list of replies, or :data:`LOST`; the reply to a read is a head and items.
    """

    def __init__(self, state: ReplicaState, *replies: Any) -> None:
        super().__init__(state, SimpleNamespace(shown="store:1"), 1.0)
        self.replies = deque(replies)
        self.sent: list[list[Operation] | Read] = []

    async def send(
        self, ops: Sequence[Operation], within_s: float | None = None, *, repairs: bool = False
    ) -> tuple[BatchHead, list[Reply]]:
        replies = self._next(list(ops))
        return BatchHead(NOW_US, replies == LOST, 1, None, ()), [] if replies == LOST else replies

    async def read(self, read: Read) -> tuple[ReadHead, Sequence[Any]]:
        reply: tuple[ReadHead, Sequence[Any]] = self._next(read)
        return reply

    def _next(self, request: Any) -> Any:
        self.sent.append(request)
        reply = self.replies.popleft()
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def idle(self) -> None:
        """Wait until all tasks have ended."""
        while self.tasks:
            await asyncio.gather(*self.tasks)
