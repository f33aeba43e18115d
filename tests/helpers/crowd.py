"""Many callers that make the same call in a loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def crowd(call: Callable[[], Awaitable[Any]], callers: int) -> AsyncIterator[None]:
    """During the block, this many tasks make the call in a loop; an error of a call ends the block."""

    async def repeat() -> None:
        while not over:
            await call()

    over = False
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(repeat())
        try:
            yield
        finally:
            over = True
