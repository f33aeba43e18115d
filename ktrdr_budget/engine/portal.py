"""Run the calls of a sync limiter on one event loop, in a thread that all callers share."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from ktrdr_budget.engine.batching.heartbeat import Heartbeat
from ktrdr_budget.engine.batching.pending import PendingCall
from ktrdr_budget.engine.calls.context import Flow
from ktrdr_budget.engine.engine import Engine
from ktrdr_budget.engine.leases.chunks import Grant
from ktrdr_budget.engine.leases.lease import LeaseBase
from ktrdr_budget.engine.replica.hold import HoldBase

__all__ = ["SyncRunner"]

Result = TypeVar("Result")

_starting = threading.Lock()


def _after_fork_in_child() -> None:
    global _starting
    _starting = threading.Lock()  # the parent's may have been held at the fork


os.register_at_fork(after_in_child=_after_fork_in_child)


_ENDING_S = 1.0
"""How long the end of an event loop waits for the tasks that it has cancelled."""
_CLOSED = "this limiter is closed"


def _closed_error() -> RuntimeError:
    """The error of a call on a closed limiter, the same as that of the async limiter."""
    return RuntimeError(_CLOSED)


class _Portal:
    """A daemon thread with an event loop, started at first use and again in a forked child."""

    def __init__(self) -> None:
        self._pid = 0
        self._closed_pid = 0
        """The id of the process in which the portal was closed."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None
        self._waiting: set[concurrent.futures.Future[Any]] = set()
        """Futures that threads wait for."""

    def loop(self) -> asyncio.AbstractEventLoop:
        """The running event loop; started if necessary.

        Raises:
            RuntimeError: the loop is closed.
        """
        loop = self._loop
        if loop is None or self._pid != os.getpid():
            with _starting:
                if self._closed_pid == os.getpid():
                    raise _closed_error()
                if self._loop is None or self._pid != os.getpid():
                    self._start()
                loop = self._loop
        assert loop is not None
        return loop

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=loop.run_forever, name="ktrdr-budget", daemon=True)
        self.thread.start()
        self._waiting = set()
        self._loop, self._pid = loop, os.getpid()

    def wait(self, future: concurrent.futures.Future[Any], callback: Callable[..., object], *args: Any) -> Any:
        """Run a callback on the loop, and wait for the future that the callback resolves.

        Raises:
            RuntimeError: the loop is closed, or is closed before the future is resolved.
        """
        loop = self.loop()
        waiting = self._waiting
        waiting.add(future)
        try:
            # A close removes the loop first and fails the waiting futures last: this check or the close raises.
            if self._loop is not loop:
                raise _closed_error()
            try:
                loop.call_soon_threadsafe(callback, *args)
            except RuntimeError:
                raise _closed_error() from None
            return future.result()
        finally:
            waiting.discard(future)

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Run a callback on the loop. Do nothing if the loop is closed."""
        with suppress(RuntimeError):
            self.loop().call_soon_threadsafe(callback, *args)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the loop, and return its result. Raises the same errors as :meth:`wait`."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            return self.wait(future, _run_task, work, future)
        finally:
            if inspect.getcoroutinestate(work) == inspect.CORO_CREATED and self._loop is None:
                work.close()

    def stop(self) -> None:
        """End the thread. Callers that still wait receive an error."""
        with _starting:
            self._closed_pid = os.getpid()
            loop, thread = self._loop, self.thread
            if loop is None or thread is None or self._pid != os.getpid():
                return
            self._loop = self.thread = None
        asyncio.run_coroutine_threadsafe(_end(), loop)
        thread.join()
        loop.close()
        for future in list(self._waiting):
            with suppress(concurrent.futures.InvalidStateError):
                future.set_exception(_closed_error())


def _run_task(work: Coroutine[Any, Any, Any], future: concurrent.futures.Future[Any]) -> None:
    def done(task: asyncio.Task[Any]) -> None:
        error = _closed_error() if task.cancelled() else task.exception()
        if error is None:
            future.set_result(task.result())
        else:
            future.set_exception(error)

    asyncio.get_running_loop().create_task(work).add_done_callback(done)


async def _end() -> None:
    """Cancel the running tasks, and stop the loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_ENDING_S)
    asyncio.get_running_loop().stop()


class SyncRunner:
    """Runs the calls of a sync limiter on an event loop in the background, while the calling thread waits."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._dispatcher = engine.dispatcher
        self.portal = _Portal()

    def run(self, flow: Flow[Result], operation: str) -> Result:
        """Run a call."""
        return self._run(flow, operation)

    def settle(self, flow: Flow[Result], operation: str) -> Result:
        """Run a settlement that its caller cannot retry. After a lost reply, the limiter resends the settlement."""
        return self._run(flow, operation, kept=True)

    def _run(self, flow: Flow[Result], operation: str, *, kept: bool = False) -> Result:
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        begun: list[PendingCall] = []
        try:
            return self.portal.wait(future, self._begin, flow, operation, future, kept, begun)  # type: ignore[no-any-return]
        except BaseException as error:
            if not future.done() or future.exception() is not error:
                self.portal.call_soon(self._leave, begun, error)  # Ctrl-C, while the outcome may be arriving
            raise

    def _begin(
        self,
        flow: Flow[Any],
        operation: str,
        future: concurrent.futures.Future[Any],
        kept: bool,
        begun: list[PendingCall],
    ) -> None:
        try:
            begun.append(self._dispatcher.begin(flow, operation, future, kept=kept))
        except BaseException as error:
            future.set_exception(error)

    def _leave(self, begun: list[PendingCall], error: BaseException) -> None:
        for call in begun:
            self._dispatcher.leave(call, error)

    def open(self) -> None:
        """Open the store."""
        self.portal.run(self._engine.store.open())

    def close(self) -> None:
        """Finish calls in flight, within twice the deadline, and disconnect. Waiting threads receive an error."""
        try:
            self._close()
        except RuntimeError as error:
            if str(error) != _CLOSED:  # else it was closed before
                raise

    def _close(self) -> None:
        try:
            for lease in list(self._engine.lease_calls.open_leases):
                self.portal.run(lease.closed(all_grants=True))
        finally:
            try:
                self.portal.run(self._dispatcher.close())
            finally:
                self.portal.stop()

    def start_heartbeat(self, hold: HoldBase) -> Callable[[], object]:
        """Extend a hold whenever a third of its ttl has passed. Return the function that stops these heartbeats."""
        self.portal.loop()  # raises if the limiter is closed
        started: list[Heartbeat] = []

        def stop() -> None:
            for heartbeat in started:
                heartbeat.stop()

        # The thread runs start and stop in order, so that neither needs to wait for the thread.
        self.portal.call_soon(lambda: started.append(Heartbeat(self._dispatcher, hold)))
        return partial(self.portal.call_soon, stop)

    def open_lease(self, lease: LeaseBase) -> None:
        """Open a lease, and wait for its first chunk."""
        self.portal.run(lease.opened())

    def close_lease(self, lease: LeaseBase) -> None:
        """Close a lease, and wait until its chunks are settled."""
        if lease.belongs_here:
            self.portal.run(lease.closed())

    def acquire(self, lease: LeaseBase, units: int) -> Grant:
        """Wait until a lease has room, and return the grant."""
        future: concurrent.futures.Future[Grant] = concurrent.futures.Future()
        try:
            return self.portal.wait(future, lease.wait, units, future)  # type: ignore[no-any-return]
        except BaseException:
            if not future.cancel() and not future.cancelled() and future.exception() is None:
                future.result().release()  # Ctrl-C, while it was granted
            raise
