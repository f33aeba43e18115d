"""Tasks, timers and batches that belong to a limiter, but to none of its calls."""

from __future__ import annotations

import asyncio
import contextvars
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ktrdr_budget.engine.protocol.batch import BatchHead, Header, encode_batch, parse_batch
from ktrdr_budget.engine.protocol.operations import Operation
from ktrdr_budget.engine.protocol.replies import Reply
from ktrdr_budget.engine.protocol.requests import Read, ReadHead, parse_read
from ktrdr_budget.engine.replica.state import ReplicaState
from ktrdr_budget.engine.transport.errors import NoScript, Transient
from ktrdr_budget.engine.transport.store import Store
from ktrdr_budget.errors import StoreError, StoreUnavailable

__all__ = ["NO_REPLY", "Background", "DataLossPending", "refuses_everything"]

NO_REPLY = (Transient, TimeoutError, StoreUnavailable, OSError, NoScript)
"""The exceptions that :meth:`Background.send` raises if the store does not reply, or refuses the batch."""

_REFUSES_EVERYTHING = re.compile(r"\b(OOM|NOPERM|NOAUTH|WRONGPASS|MISCONF|KTRDRSCHEMA)\b|[Nn]o permissions")


class DataLossPending(StoreUnavailable):
    """The store has lost writes that replicas have not replayed yet, so the reply to a read cannot be used."""


def refuses_everything(error: StoreError) -> bool:
    """Whether an error concerns the whole store, so that the store would now refuse any batch."""
    return _REFUSES_EVERYTHING.search(str(error)) is not None


class Background:
    """The background tasks of one limiter, on one event loop. The tasks end with the limiter.

    Args:
        timeout_s: how long to wait for the reply to a batch.
    """

    def __init__(self, state: ReplicaState, store: Store, timeout_s: float) -> None:
        self.state = state
        self.store = store
        self.timeout_s = timeout_s
        self.reset()

    def reset(self) -> None:
        """Set the initial state, without an event loop; also in the child after a fork."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.closed = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of the limiter; ``None`` before :meth:`bind` sets it."""
        return self._loop

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use this event loop from now on."""
        self._loop = loop

    def time(self) -> float:
        """The event loop's clock, in seconds."""
        assert self._loop is not None
        return self._loop.time()

    def spawn(self, work: Any, context: contextvars.Context | None = None) -> None:
        """Start a task.

        Args:
            context: the context variables of the task. ``None``: an empty context, so that requests of the task are not
                traced as requests of a caller.
        """
        assert self._loop is not None
        task = self._loop.create_task(work, context=context or contextvars.Context())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call a function in the next turn of the event loop."""
        assert self._loop is not None
        self._loop.call_soon(callback)

    def later(self, delay_s: float, method: Callable[[], None]) -> asyncio.TimerHandle:
        """Call a bound method after a delay.

        The timer must not keep a limiter alive: if the object of the method was garbage collected, nothing is called.
        """
        assert self._loop is not None
        return self._loop.call_later(delay_s, _call, weakref.WeakMethod(method))

    async def send(
        self, ops: Sequence[Operation], within_s: float | None = None, *, repairs: bool = False
    ) -> tuple[BatchHead, list[Reply]]:
        """Send one batch that belongs to no caller.

        Args:
            within_s: how long to wait for the reply; ``None``: the timeout of the limiter.
            repairs: whether the operations replay data that the store has lost.

        Raises:
            the exceptions of :data:`NO_REPLY`.
        """
        header = self.state.header
        await self.store.open()
        deadline_s = self.time() + (self.timeout_s if within_s is None else within_s)
        batch = encode_batch(self.state.keys, header, ops, repairs=repairs)
        head, replies = parse_batch(await self.store.apply(*batch, deadline_s), ops)
        self.state.absorb(head, header)
        return head, replies

    async def read(self, read: Read) -> tuple[ReadHead, Sequence[Any]]:
        """Send one read, and return the reply.

        Raises:
            DataLossPending: the store has lost writes, so the reply cannot be used.
            the exceptions of :data:`NO_REPLY`.
        """
        header = self.state.header
        await self.store.open()
        return self.checked(read, header, await self.store.run(read, self.time() + self.timeout_s))

    def checked(self, read: Read, header: Header, reply: Any) -> tuple[ReadHead, Sequence[Any]]:
        """Check that the store has lost no data, and return the parsed reply to a read.

        Args:
            header: the state of this replica when the read was sent.

        Raises:
            DataLossPending: the store has lost writes, or other replicas may still replay lost writes.
        """
        head, items = parse_read(reply)
        if not self.state.confirms_timeline(head, header):
            raise self.data_loss_pending()
        if head.recovering_until_ms and (
            read.while_recovering == "waits" or (read.while_recovering == "answers if found" and _is_empty(items))
        ):
            raise self.data_loss_pending((head.recovering_until_ms - head.now_ms) / 1000)
        return head, items

    def data_loss_pending(self, wait_s: float | None = None) -> DataLossPending:
        """The error for a reply that cannot be used.

        Args:
            wait_s: seconds until a read may succeed; ``None`` if unknown.
        """
        again = "" if wait_s is None else f"; try again in {wait_s:.1f} s"
        return DataLossPending(
            f"store at {self.store.shown}: it lost writes and is being repaired{again}", reached=True
        )

    async def end(self) -> None:
        """Cancel the running tasks, and wait until they have ended."""
        self.closed = True
        tasks = [task for task in self.tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_empty(items: Sequence[Any]) -> bool:
    """Whether a read found nothing: each item is missing, or is a list of missing records."""
    return all(item is None or (isinstance(item, list) and not any(item)) for item in items)


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    found = method()
    if found is not None:
        found()
