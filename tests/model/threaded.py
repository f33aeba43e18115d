"""An async interface to a sync limiter: each call runs in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ktrdr_budget import BudgetLimiter
from ktrdr_budget.sync import Hold

WAITING = (
    *("start", "close", "reserve", "record", "commit", "release", "extend", "grow", "get", "status", "statuses"),
    *("holds", "ledger", "set_limit", "clear_limit"),
)


class Threaded:
    """A proxy of a limiter or hold: methods that wait for the store are coroutines, all others are unchanged."""

    def __init__(self, inner: BudgetLimiter | Hold) -> None:
        self._inner = inner

    def __str__(self) -> str:
        return f"Threaded({self._inner})"

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in WAITING:
            return found

        async def call(*words: Any, **options: Any) -> Any:
            reply = await asyncio.to_thread(found, *words, **options)
            return Threaded(reply) if isinstance(reply, Hold) else reply

        return call

    @asynccontextmanager
    async def hold(self, *words: Any, **options: Any) -> AsyncIterator[Threaded]:
        """`with limiter.hold(…)` as an async block."""
        manager = self._inner.hold(*words, **options)
        hold = await asyncio.to_thread(manager.__enter__)
        try:
            yield Threaded(hold)
        except Exception as error:
            if not await asyncio.to_thread(manager.__exit__, type(error), error, error.__traceback__):
                raise
        else:
            await asyncio.to_thread(manager.__exit__, None, None, None)
