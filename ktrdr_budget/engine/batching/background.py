"""What a limiter does on nobody's behalf: tasks and timers of its event loop, and batches beside the lanes."""

from __future__ import annotations

import asyncio
import contextvars
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ktrdr_budget.engine.protocol import Head, Header, Op, Read, ReadHead, encode_batch, parse_batch, parse_read
from ktrdr_budget.engine.protocol.scripts import REPAIR
from ktrdr_budget.engine.replica.state import Session
from ktrdr_budget.engine.transport.store import NoScript, Store, Transient
from ktrdr_budget.errors import StoreError, StoreUnavailable

__all__ = ["UNANSWERED", "Background", "Unrepaired", "refuses_all"]

UNANSWERED = (Transient, TimeoutError, StoreUnavailable, OSError, NoScript)
"""What :meth:`Background.tell` raises when the store gives no answer, or refuses."""


class Unrepaired(StoreUnavailable):
    """A read's reply does not count: the store has lost writes, and replicas have yet to replay them."""


_OF_ALL = re.compile(r"\b(OOM|NOPERM|NOAUTH|WRONGPASS|MISCONF|KTRDRSCHEMA)\b|[Nn]o permissions")


def refuses_all(error: StoreError) -> bool:
    """Whether an error says nothing of one operation: whatever is told now is refused."""
    return _OF_ALL.search(str(error)) is not None


class Background:
    """Belongs to one event loop; its tasks end with the limiter.

    Args:
        timeout: seconds within which a batch is answered.
    """

    def __init__(self, session: Session, store: Store, timeout: float) -> None:
        self.session = session
        self.store = store
        self.timeout = timeout
        self.reset()

    def reset(self) -> None:
        """Has no event loop yet; in the child after a fork, not any more."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.closed = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop; ``None`` before its first use."""
        return self._loop

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Works on this event loop from now on."""
        self._loop = loop

    def time(self) -> float:
        """The event loop's."""
        assert self._loop is not None
        return self._loop.time()

    def spawn(self, work: Any, context: contextvars.Context | None = None) -> None:
        """Starts a task, in a context of its own: an instrumentation of the driver sees on whose behalf."""
        assert self._loop is not None
        task = self._loop.create_task(work, context=context or contextvars.Context())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def soon(self, callback: Callable[[], None]) -> None:
        """Calls it in the next turn of the event loop."""
        assert self._loop is not None
        self._loop.call_soon(callback)

    def later(self, delay_s: float, method: Callable[[], None]) -> asyncio.TimerHandle:
        """Calls a bound method later, unless its object has gone: a timer keeps no forgotten limiter alive."""
        assert self._loop is not None
        return self._loop.call_later(delay_s, _call, weakref.WeakMethod(method))

    async def tell(
        self, ops: Sequence[Op], within_s: float | None = None, *, repairs: bool = False
    ) -> tuple[Head, list[str]]:
        """One batch beside the lanes.

        Args:
            repairs: it tells a store again what it has lost: nothing is granted before it has heard all of it.

        Raises:
            the exceptions of :data:`UNANSWERED`.
        """
        header = self.session.header
        await self.store.open()
        deadline = self.time() + (self.timeout if within_s is None else within_s)
        name, keys, args = encode_batch(self.session.keys, header, ops)
        answer = await self.store.apply(REPAIR if repairs else name, keys, args, deadline)
        head, lines = parse_batch(answer)
        self.session.absorb(head, header)
        return head, lines

    async def read(self, read: Read) -> tuple[ReadHead, Sequence[Any]]:
        """One read; raises as :meth:`tell`, or :class:`Unrepaired`."""
        header = self.session.header
        await self.store.open()
        return self.checked(read, header, await self.store.run(read, self.time() + self.timeout))

    def checked(self, read: Read, header: Header, reply: Any) -> tuple[ReadHead, Sequence[Any]]:
        """The reply to a read, if it counts; the one place that compares its epoch with the known one.

        Args:
            header: as this replica knew the store when it sent the read.

        Raises:
            Unrepaired: the store has lost what it acknowledged, or may lack what others have yet to replay.
        """
        head, items = parse_read(reply)
        if not self.session.believes(head, header):
            raise self.unrepaired()
        if head.recovering_until_ms and (
            read.while_recovering == "waits"
            or (read.while_recovering == "answers if found" and all(item is None for item in items))
        ):
            raise self.unrepaired((head.recovering_until_ms - head.now_us // 1000) / 1000)
        return head, items

    def unrepaired(self, wait_s: float | None = None) -> Unrepaired:
        """The error for a reply that does not count; ``wait_s``: seconds after which another may."""
        again = "" if wait_s is None else f"; try again in {wait_s:.1f} s"
        return Unrepaired(f"store at {self.store.shown}: it lost writes and is being repaired{again}", reached=True)

    async def end(self) -> None:
        """Cancels what is under way, and waits until it has ended."""
        self.closed = True
        tasks = [task for task in self.tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    found = method()
    if found is not None:
        found()
