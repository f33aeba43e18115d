"""The synchronous limiter: the same flows, driven by one background event loop that its threads share.

So threads gain what tasks do: calls that are made while a round trip is under way travel together in the next.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any

from ktrdr_budget.engine.batching.call import Call
from ktrdr_budget.engine.batching.heartbeat import Heartbeat
from ktrdr_budget.engine.calls.reads import Flow
from ktrdr_budget.engine.protocol.amounts import Amounts
from ktrdr_budget.engine.replica.hold import HoldBase, OnError, check_on_error, current_hold, restore_hold
from ktrdr_budget.errors import BudgetError, StoreError, StoreUnavailable
from ktrdr_budget.lease import IDLE_DEFAULT_S, LEASE_TTL_DEFAULT_S, Lease
from ktrdr_budget.limiter import LimiterBase, logger
from ktrdr_budget.models import (
    TTL_DEFAULT_S,
    HoldView,
    LedgerEntry,
    Migration,
    OnExpiry,
    Page,
    Settlement,
    Status,
    Statuses,
)
from ktrdr_budget.money import AmountIn

__all__ = ["BudgetLimiter", "Hold"]


_starting = threading.Lock()


def _after_fork_in_child() -> None:
    global _starting
    _starting = threading.Lock()  # the parent's may have been held at the fork


os.register_at_fork(after_in_child=_after_fork_in_child)


_ENDING_S = 1.0
"""How long the end of an event loop waits for the tasks that it has cancelled."""


_CLOSED = "this limiter is closed"


def _ended() -> RuntimeError:
    """The error of a call on a limiter that is closed, as that of the async limiter."""
    return RuntimeError(_CLOSED)


class _Portal:
    """A daemon thread with an event loop, started at first use, and anew in a forked child."""

    def __init__(self) -> None:
        self._pid = 0
        self._ended_pid = 0
        """In which process it has ended."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._waiting: set[concurrent.futures.Future[Any]] = set()
        """What threads wait for."""

    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop.

        Raises:
            RuntimeError: it has ended.
        """
        loop = self._loop
        if loop is None or self._pid != os.getpid():
            with _starting:
                if self._ended_pid == os.getpid():
                    raise _ended()
                if self._loop is None or self._pid != os.getpid():
                    self._start()
                loop = self._loop
        assert loop is not None
        return loop

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="ktrdr-budget", daemon=True)
        self._thread.start()
        self._waiting = set()
        self._loop, self._pid = loop, os.getpid()

    def wait(self, future: concurrent.futures.Future[Any], callback: Callable[..., object], *args: Any) -> Any:
        """Has the loop call this, and waits for the future that it will settle.

        Raises:
            RuntimeError: the loop has ended, or ends before the future is settled.
        """
        loop = self.loop()
        waiting = self._waiting
        waiting.add(future)
        try:
            # Whoever ends the loop takes it away first, and settles last what waits: one of both sees the other.
            if self._loop is not loop:
                raise _ended()
            try:
                loop.call_soon_threadsafe(callback, *args)
            except RuntimeError:
                raise _ended() from None
            return future.result()
        finally:
            waiting.discard(future)

    def tell(self, callback: Callable[..., object], *args: Any) -> None:
        """Has the loop call this, unless it has ended."""
        with suppress(RuntimeError):
            self.loop().call_soon_threadsafe(callback, *args)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine there, and waits; errors as for :meth:`wait`."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            return self.wait(future, _begin, work, future)
        finally:
            if inspect.getcoroutinestate(work) == inspect.CORO_CREATED and self._loop is None:
                work.close()

    def stop(self) -> None:
        """Ends the thread; what is left is told so."""
        with _starting:
            self._ended_pid = os.getpid()
            loop, thread = self._loop, self._thread
            if loop is None or thread is None or self._pid != os.getpid():
                return
            self._loop = self._thread = None
        asyncio.run_coroutine_threadsafe(_end(), loop)
        thread.join()
        loop.close()
        for future in list(self._waiting):
            with suppress(concurrent.futures.InvalidStateError):
                future.set_exception(_ended())


def _begin(work: Coroutine[Any, Any, Any], future: concurrent.futures.Future[Any]) -> None:
    def told(task: asyncio.Task[Any]) -> None:
        error = _ended() if task.cancelled() else task.exception()
        if error is None:
            future.set_result(task.result())
        else:
            future.set_exception(error)

    asyncio.get_running_loop().create_task(work).add_done_callback(told)


async def _end() -> None:
    """Cancels what is under way, and stops the loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_ENDING_S)
    asyncio.get_running_loop().stop()


class Hold(HoldBase):
    """An open reservation; :class:`~ktrdr_budget.limiter.AsyncHold` without ``await``."""

    __slots__ = ()

    def extend(self, ttl: float | None = None) -> None:
        """See :meth:`AsyncHold.extend`."""
        _runner(self)(self.extend_flow(ttl), "extend")

    def grow(self, amount: Amounts) -> None:
        """See :meth:`AsyncHold.grow`."""
        _runner(self)(self.grow_flow(amount), "grow")

    def commit(self, amount: Amounts | None = None) -> Settlement:
        """See :meth:`AsyncHold.commit`."""
        return _runner(self)(self.commit_flow(amount), "commit")  # type: ignore[no-any-return]

    def release(self) -> Settlement:
        """See :meth:`AsyncHold.release`."""
        return _runner(self)(self.release_flow(), "release")  # type: ignore[no-any-return]


def _runner(hold: HoldBase) -> Callable[[Flow[Any], str], Any]:
    return hold._core.runner  # type: ignore[no-any-return]


class BudgetLimiter(LimiterBase):
    """:class:`~ktrdr_budget.limiter.AsyncBudgetLimiter` without ``await``, safe to share between threads.

    Arguments, results and errors are the same. ``with BudgetLimiter(url, budgets) as limiter`` closes it.
    """

    _hold_class = Hold

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._portal = _Portal()
        self._core.runner = self._run

    __init__.__doc__ = LimiterBase.__doc__

    def __enter__(self) -> BudgetLimiter:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """See :meth:`AsyncBudgetLimiter.start`."""
        self._portal.run(self._store.open())
        try:
            self._run(self._core.begin(), "start")
        except StoreError:
            raise
        except StoreUnavailable as error:
            logger.warning("starting without the store: %s", error)

    def close(self) -> None:
        """Lets what was begun finish, and disconnects. Whoever calls from another thread meanwhile is told so."""
        try:
            self._close()
        except RuntimeError as error:
            if str(error) != _CLOSED:  # else it was closed before
                raise

    def _close(self) -> None:
        try:
            for lease in list(self._core.leases):
                self._portal.run(lease.closed(all_grants=True))
        finally:
            try:
                self._portal.run(self._coalescer.close())
            finally:
                self._portal.stop()

    def _run(self, flow: Flow[Any], operation: str, *, kept: bool = False) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        begun: list[Call] = []
        try:
            return self._portal.wait(future, self._begin, flow, operation, future, kept, begun)
        except BaseException as error:
            if not future.done() or future.exception() is not error:
                self._portal.tell(self._leave_call, begun, error)  # Ctrl-C, while the outcome may be arriving
            raise

    def _begin(
        self,
        flow: Flow[Any],
        operation: str,
        future: concurrent.futures.Future[Any],
        kept: bool,
        begun: list[Call],
    ) -> None:
        try:
            begun.append(self._coalescer.begin(flow, operation, future, kept=kept))
        except BaseException as error:
            future.set_exception(error)

    def _leave_call(self, begun: list[Call], error: BaseException) -> None:
        for call in begun:
            self._coalescer.leave(call, error)

    def _conclude(self, flow: Flow[Any], operation: str) -> Any:
        """See :meth:`AsyncBudgetLimiter._conclude`."""
        return self._run(flow, operation, kept=True)

    # -- reserve and settle --------------------------------------------------------------------------------------------

    def reserve(
        self,
        budget: str | Mapping[str, AmountIn],
        amount: AmountIn | None = None,
        *,
        id: str | None = None,
        ttl: float = TTL_DEFAULT_S,
        on_expiry: OnExpiry = "charge",
        operation: str = "",
        owner: str = "",
    ) -> Hold:
        """See :meth:`AsyncBudgetLimiter.reserve`."""
        flow = self._core.reserve(budget, amount, id, ttl, on_expiry, operation, owner)
        return self._run(flow, "reserve")  # type: ignore[no-any-return]

    @contextmanager
    def hold(
        self,
        budget: str | Mapping[str, AmountIn],
        amount: AmountIn | None = None,
        *,
        id: str | None = None,
        ttl: float = TTL_DEFAULT_S,
        on_expiry: OnExpiry = "charge",
        on_error: OnError = "release",
        operation: str = "",
        owner: str = "",
    ) -> Iterator[Hold]:
        """See :meth:`AsyncBudgetLimiter.hold`."""
        check_on_error(on_error)
        hold = self.reserve(budget, amount, id=id, ttl=ttl, on_expiry=on_expiry, operation=operation, owner=owner)
        with self.keep(hold, on_error=on_error):
            yield hold

    @contextmanager
    def keep(self, hold: Hold, *, on_error: OnError = "release") -> Iterator[Hold]:
        """See :meth:`AsyncBudgetLimiter.keep`."""
        check_on_error(on_error)
        heartbeat = self._portal.run(self._heartbeat(hold))
        stop = partial(self._portal.tell, heartbeat.stop)
        outer = current_hold.set(hold)
        try:
            yield hold
        except BaseException:
            self._leave(hold, True, on_error, stop)
            raise
        else:
            self._leave(hold, False, on_error, stop)
        finally:
            restore_hold(outer)

    async def _heartbeat(self, hold: Hold) -> Heartbeat:
        return Heartbeat(self._coalescer, hold)

    def _leave(self, hold: Hold, failed: bool, on_error: OnError, stop: Callable[[], object]) -> None:
        if hold.leave_to_calls(failed, on_error, stop):
            return
        stop()
        flow = hold.exit_flow(failed, on_error)
        if flow is None:
            return
        try:
            self._conclude(flow, "settle")
        except BudgetError as error:
            if not failed:
                raise
            logger.warning("hold %s could not be settled: %s", hold.id, error)

    def lease(
        self,
        budget: str,
        slab: AmountIn,
        *,
        low_water: AmountIn | None = None,
        ttl: float = LEASE_TTL_DEFAULT_S,
        idle: float | None = IDLE_DEFAULT_S,
        operation: str = "lease",
    ) -> Lease:
        """See :meth:`AsyncBudgetLimiter.lease`; ``with`` what this returns."""
        options = {"low_water": low_water, "ttl": ttl, "idle": idle, "operation": operation}
        return Lease(self._portal, self._core, budget, slab, timeout=self._timeout, **options)

    def commit(self, id: str, amount: Amounts | None = None) -> Settlement:
        """See :meth:`AsyncBudgetLimiter.commit`."""
        return self._run(self._core.settle_id(id, amount), "commit")  # type: ignore[no-any-return]

    def release(self, id: str, *, operator: bool = False) -> Settlement:
        """See :meth:`AsyncBudgetLimiter.release`."""
        return self._run(self._core.settle_id(id, None, release=True, operator=operator), "release")  # type: ignore[no-any-return]

    def extend(self, id: str, ttl: float | None = None, *, accrued: Amounts | None = None) -> HoldView:
        """See :meth:`AsyncBudgetLimiter.extend`."""
        return self._run(self._core.extend_id(id, ttl, accrued), "extend")  # type: ignore[no-any-return]

    def grow(self, id: str, amounts: Mapping[str, AmountIn], *, ttl: float = TTL_DEFAULT_S) -> HoldView:
        """See :meth:`AsyncBudgetLimiter.grow`."""
        return self._run(self._core.grow_id(id, amounts, ttl), "grow")  # type: ignore[no-any-return]

    def record(
        self,
        budget: str | Mapping[str, AmountIn],
        amount: AmountIn | None = None,
        *,
        id: str | None = None,
        operation: str = "",
    ) -> Settlement:
        """See :meth:`AsyncBudgetLimiter.record`."""
        return self._run(self._core.record(budget, amount, id, operation), "record")  # type: ignore[no-any-return]

    # -- reads ---------------------------------------------------------------------------------------------------------

    def status(self, budget: str, *, complete: bool = False) -> Status:
        """See :meth:`AsyncBudgetLimiter.status`."""
        return self._run(self._core.status([budget], complete=complete), "status")[0]  # type: ignore[no-any-return]

    def statuses(self, *, complete: bool = False) -> Statuses:
        """See :meth:`AsyncBudgetLimiter.statuses`."""
        return self._run(self._core.statuses(complete=complete), "status")  # type: ignore[no-any-return]

    def check(self) -> dict[str, str | None]:
        """See :meth:`AsyncBudgetLimiter.check`."""
        return self._run(self._core.check(), "check")  # type: ignore[no-any-return]

    def get(self, id: str) -> HoldView:
        """See :meth:`AsyncBudgetLimiter.get`."""
        return self._run(self._core.hold_view(id), "get")  # type: ignore[no-any-return]

    def holds(self, budget: str, *, limit: int = 100, cursor: str | None = None) -> Page[HoldView]:
        """See :meth:`AsyncBudgetLimiter.holds`."""
        return self._run(self._core.holds(budget, limit, cursor), "holds")  # type: ignore[no-any-return]

    def ledger(
        self, budget: str, window: str | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> Page[LedgerEntry]:
        """See :meth:`AsyncBudgetLimiter.ledger`."""
        return self._run(self._core.ledger(budget, window, limit, cursor), "ledger")  # type: ignore[no-any-return]

    # -- limits --------------------------------------------------------------------------------------------------------

    def set_limit(self, budget: str, limit: AmountIn | None, until: datetime | str | None = None) -> Status:
        """See :meth:`AsyncBudgetLimiter.set_limit`."""
        return self._run(self._core.set_limit(budget, limit, until), "set_limit")  # type: ignore[no-any-return]

    def clear_limit(self, budget: str) -> Status:
        """See :meth:`AsyncBudgetLimiter.clear_limit`."""
        return self._run(self._core.clear_limit(budget), "clear_limit")  # type: ignore[no-any-return]

    # -- definitions ---------------------------------------------------------------------------------------------------

    def migrate(self, budget: str) -> Migration:
        """See :meth:`AsyncBudgetLimiter.migrate`."""
        return self._run(self._core.migrate(budget), "migrate")  # type: ignore[no-any-return]
