"""One run of the bench: real servers, spending replicas, faults, and a verdict on the complete history."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from ktrdr_budget import Budget, BudgetLimiter, StoreUnavailable
from ktrdr_budget.audit import verify
from ktrdr_budget.engine.protocol.keys import stored_window

from ..conftest import ClockedServer, libfaketime, valkey_binary
from ..helpers.processes import Worker, workers
from ..helpers.waiting import WITHIN_S, wait_until
from .history import NO_REPLY, Books, books, read
from .judge import Terms, Verdict, judge

TIMEOUT_S = 1.0
GRANTS_MIN = 20
READ_EACH_S = 0.1
"""Interval between two reads of the histories. A read takes processor time from the proxies in this process."""
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
CLOCKS = ("", "+26h", "-26h")
_UNREACHABLE = (redis.RedisError, redis.exceptions.RedisClusterException, OSError)


@dataclass(frozen=True)
class Row:
    """One row of the table in ``docs/reliability.md``: a fault, and what must hold."""

    name: str
    fault: str
    """Text of the column ``fault``; ``must_hold`` is the text of the next column."""
    must_hold: str
    run: Callable[[Bench], None]
    seconds: float
    short_s: float = 0.0
    """Duration in ``make test``; 0 if the row does not run there, because other rows have similar faults."""


@dataclass
class Figures:
    """The figures of a run."""

    row: Row
    seed: int
    seconds: float
    faults: int = 0
    losses: int = 0
    """Data losses detected, summed over the replicas."""
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def line(self) -> str:
        """One line for the terminal."""
        v = self.verdict
        return (
            f"{self.row.name}: seed {self.seed}, {self.seconds:g} s: {v.operations:,} operations,"
            f" {self.faults:,} faults,"
            f" {v.grants:,} grants, spend ${v.spend / 1e9:,.6f}, overspend {usd(v.overspend)}, lost {usd(v.lost)},"
            f" {v.resolved:,} of {v.unknown:,} unknown resolved, {self.losses} losses noticed,"
            f" longest call {v.longest_s:.2f} s, {v.late_s:.2f} s late: {'BROKEN' if v.violations else 'kept'}"
        )


def usd(units: int) -> str:
    """Nano-dollars as dollars, or a plain 0."""
    return f"${units / 1e9:,.6f}" if units > 0 else "0"


class Bench:
    """The tools of a row: it starts servers and replicas, and counts faults.

    Args:
        directory: for servers, sockets and histories; its path must be short, because paths of sockets are limited.
        quick: fewer calls, so that several runs can share the machine.
    """

    def __init__(self, row: Row, seed: int, seconds: float, directory: Path, *, quick: bool = False) -> None:
        self.row = row
        self.seconds = seconds
        self.directory = directory
        self.replicas = 6
        self.random = random.Random(f"{row.name} {seed}")
        self.figures = Figures(row, seed, seconds)
        self.quick = quick
        self.clocks = (self.random.choice(CLOCKS),) if quick else CLOCKS
        """Clocks of the replicas, assigned in turn."""
        limit = 20.0 if quick else 150.0
        self.budgets: list[dict[str, Any]] = [
            {"name": "agent", "limit": f"{limit * 0.2:.2f}"},
            {"name": "team", "limit": f"{limit * 0.4:.2f}"},
            {"name": "jobs", "limit": 3 if quick else 12, "kind": "slots"},
            {"name": "facts", "limit": None},
        ]
        self.tenants = ["default"]
        self.callers = 4 if quick else 8
        self.pause_ms = 80.0 if quick else 20.0 + 3.0 * seconds
        self.cancels = 0.1
        self.leaves = True
        """Whether some callers abandon their holds."""
        self.closes_first = False
        """Whether replicas close before all holds have expired, because an open lease keeps extending its chunks."""
        made = [Budget(**spec) for spec in self.budgets]
        self.terms = Terms({budget.name: budget.limit_units for budget in made}, TIMEOUT_S)
        if quick:
            self.terms.tolerance_s = self.terms.lateness_max_s = 8.0
        self.untouched: tuple[str, ...] = ()
        """Tenants on servers without a fault: each of their calls has a reply."""
        self.losses_expected: bool | None = False
        """Whether the store loses data; ``None`` if that is uncertain."""
        self.spenders: list[Worker] = []
        self._generations = 0
        self._limiter_options: dict[str, Any] = {}
        self._connect: Callable[[], Any] = redis.Redis
        self._ends = 0.0
        self.url = ""
        self._opened = ExitStack()
        self._sampler: _Sampler | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    # -- the tools of a row -------------------------------------------------------------------------------------------

    def server(self, *options: str, binary: str | None = None, start: bool = True) -> ClockedServer:
        """A server whose clock shows midnight (UTC) in the middle of the run."""
        directory = self.directory / "s"
        directory.mkdir()
        server = ClockedServer(binary or valkey_binary(), directory, options)
        server.offset_s = self._put_midnight(after_s=1.0)
        self._opened.callback(server.kill)
        if start:
            server.start()
        return server

    def clock_environment(self) -> dict[str, str]:
        """Environment of a group of servers whose clock shows midnight in the middle of the run."""
        offset_s = self._put_midnight(after_s=3.0)
        return {**_faked(f"+{offset_s:.3f}"), "LD_PRELOAD": f"{libfaketime()}:libc.so.6", "TZ": "UTC"}

    def _put_midnight(self, after_s: float) -> float:
        """Offset of a server's clock, in seconds, that puts its midnight into the middle of the run."""
        wait_s = after_s + self.seconds / 2
        self.terms.midnight_ns = time.monotonic_ns() + int(wait_s * 1e9)
        now = datetime.now(UTC)
        midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        return (midnight - now).total_seconds() - wait_s

    def enter(self, context: Any) -> Any:
        """Enter a context until the end of the run."""
        return self._opened.enter_context(context)

    def spend(self, url: str, connect: Callable[[], Any], **limiter_options: Any) -> None:
        """Start the replicas; the duration of the run counts from now.

        Args:
            connect: makes a client for reads of the raw keys.
            limiter_options: options of each limiter.
        """
        self.url, self._connect, self._limiter_options = url, connect, limiter_options
        for clock in self.clocks:
            self.start_spenders(self.replicas // len(self.clocks), clock)
        self._sampler = _Sampler(connect, self.tenants, self.terms.limits)
        self._sampler.start()
        self._ends = time.monotonic() + self.seconds
        if self.terms.midnight_ns is not None:
            self._ends = max(self._ends, self.terms.midnight_ns / 1e9 + 0.5)

    def start_spenders(self, count: int, clock: str = "", **limiter_options: Any) -> None:
        """Start more replicas."""
        options = {
            "url": self.url, "tenants": self.tenants, "budgets": self.budgets, "timeout": TIMEOUT_S,
            # With several runs at once, calls may also be late where the store has no fault.
            "timeouts": dict.fromkeys(self.untouched, 20.0) if self.quick else {},
            "settling_timeout": 5.0 if self.quick else TIMEOUT_S,
            "callers": self.callers, "pause_ms": self.pause_ms, "cancels": self.cancels, "leaves": self.leaves,
            "limiter": {**self._limiter_options, **limiter_options}, "seed": self.figures.seed,
            "number": self._generations, "history": f"{self.histories}/{{number}}.{{worker}}.jsonl",
        }  # fmt: skip
        self._generations += 1
        environment = {} if not clock or libfaketime() is None else {**_faked(clock), "LD_PRELOAD": str(libfaketime())}
        started = self.enter(workers("chaotic.py", count, options, environment))
        self.spenders += started
        for spender in started:
            spender.send(go=True)

    @property
    def histories(self) -> Path:
        """The directory of the replicas' histories."""
        place = self.directory / "histories"
        place.mkdir(exist_ok=True)
        return place

    def wait_spending(self) -> None:
        """Wait until the store has acknowledged a call of each replica, so that a fault can lose data."""

        def all_have() -> bool:
            return len({call.replica for call in read(self.histories) if call.acknowledged}) >= len(self.spenders)

        wait_until(all_have, every_s=READ_EACH_S)

    def kill_spender(self) -> None:
        """Kill a random replica with SIGKILL."""
        spender = self.spenders.pop(self.random.randrange(len(self.spenders)))
        spender.kill()

    def turns(self, least_s: float, most_s: float) -> Iterator[float]:
        """Yield the seconds left at random moments until the run ends; the run lasts at least until there was a fault.

        Every replica has spent before the first moment, so that each fault occurs under load even on a slow machine.
        """
        self.wait_spending()
        self.last(2 * most_s)
        while (left := self._left_s(most_s)) > 0:
            time.sleep(min(left, self.random.uniform(least_s, most_s)))
            if (left := self._left_s(most_s)) > 0:
                yield left

    def _left_s(self, until_fault_s: float) -> float:
        """Seconds until the end of the run; at least ``until_fault_s`` if no fault was provoked yet."""
        left_s = self._ends - time.monotonic()
        if self.figures.faults:
            return left_s
        assert left_s > -WITHIN_S, "no fault could be provoked"
        return max(left_s, until_fault_s)

    def last(self, least_s: float) -> None:
        """Extend the run if less than this time is left, as it may be on a busy machine."""
        self._ends = max(self._ends, time.monotonic() + least_s)

    def fault(self, count: int = 1) -> None:
        """Count faults."""
        self.figures.faults += count

    def expect_ready(self, ready: bool) -> None:
        """Check the readiness of a new limiter."""
        with BudgetLimiter(self.url, timeout=20.0 if ready else TIMEOUT_S) as limiter:
            wrong = {name: text for name, text in limiter.check().items() if text}
        if ready is bool(wrong):
            self.figures.verdict.blame(f"a limiter reports {wrong} while the store is {'up' if ready else 'down'}")

    def counted(self) -> int:
        """Units counted by the store in all windows: an upper bound of a loss."""
        with self._connect() as client:
            found = [books(client, tenant) for tenant in self.tenants]
        return sum(sums.total() for one in found for sums in one.sums.values())

    # -- the verdict ---------------------------------------------------------------------------------------------------

    def settle(self) -> Figures:
        """Stop the replicas, which resolve unknown outcomes first, and judge the history.

        On a slow machine, the replicas continue until there are enough grants for a verdict.
        """
        wait_until(lambda: sum(call.is_grant for call in read(self.histories)) >= GRANTS_MIN, every_s=READ_EACH_S)
        for spender in self.spenders:
            spender.send(stop=True)
        reports = [spender.receive() for spender in self.spenders]
        if not self.closes_first:
            self._wait_expired()
        for spender in self.spenders:
            spender.send(end=True)
        reports = [spender.receive() or report for spender, report in zip(self.spenders, reports, strict=True)]
        if self.closes_first:
            self._wait_expired()
        verdict = self.figures.verdict
        assert self._sampler is not None
        self._sampler.stop()
        self._judge(verdict)
        seen = self._sampler.excess - verdict.late
        # A replayed hold may be open for a moment although it was due: the window then shows too much.
        if seen > 0 and self.losses_expected is False and self.terms.steady_clock:
            verdict.overspend = max(verdict.overspend, seen)
            verdict.blame(f"the store showed {seen} units above a limit")
        self._check_reports(reports, verdict)
        return self.figures

    def _wait_expired(self) -> None:
        """Wait until no hold is open, because the abandoned holds have expired."""
        made = [Budget(**spec) for spec in self.budgets]
        limiters = [BudgetLimiter(self.url, made, tenant=tenant, timeout=20.0) for tenant in self.tenants]

        def none_is_open() -> bool:
            try:
                return not any(status.held or status.recovering_until for x in limiters for status in x.statuses())
            except StoreUnavailable:
                return False

        try:
            wait_until(none_is_open)
        finally:
            for limiter in limiters:
                limiter.close()

    def _books(self) -> list[Books]:
        with self._connect() as client:
            return [books(client, tenant) for tenant in self.tenants]

    def _judge(self, verdict: Verdict) -> None:
        calls = read(self.histories)
        for tenant, one in zip(self.tenants, self._books(), strict=True):
            mine = [call for call in calls if call.tenant == tenant]
            verdict.add(judge(mine, one, self.terms))
            if tenant in self.untouched and (refused := sum(call.outcome in NO_REPLY for call in mine)):
                verdict.blame(f"{refused} calls of tenant {tenant!r} had no reply, although its store had no fault")
            for report in verify(self.url, tenant):
                if not report.adds_up or not report.conclusive:
                    verdict.blame(f"verify: {report}")

    def _check_reports(self, reports: list[Any], verdict: Verdict) -> None:
        self.figures.losses = sum(report["losses"] for report in reports if report)
        for report in reports:
            if report and report["tenant"] in self.untouched and report["losses"]:
                verdict.blame(f"tenant {report['tenant']!r} detected a data loss, although its store had no fault")
            if report is None:
                verdict.blame("a replica ended unexpectedly")
            elif report["unknown"] or report["deferred"] or report["unresolved"]:
                verdict.blame(f"a replica has unknown outcomes at the end: {report}")
        if self.losses_expected is not None and self.losses_expected != bool(self.figures.losses):
            verdict.blame(
                "no replica detected the data loss" if self.losses_expected else "a data loss was detected without one"
            )


def _faked(clock: str) -> dict[str, str]:
    return {
        "FAKETIME": clock,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


class _Sampler(threading.Thread):
    """Reads the figures of the windows a hundred times a second, during the run."""

    def __init__(self, connect: Callable[[], Any], tenants: list[str], limits: Any) -> None:
        super().__init__(daemon=True)
        self._connect = connect
        self._capped = {name: limit for name, limit in limits.items() if limit is not None}
        self._tenants = tenants
        self._stopped = threading.Event()
        self.excess = 0
        """The largest excess over a limit, in units."""

    def run(self) -> None:
        while not self._stopped.is_set():
            with suppress(*_UNREACHABLE), contextlib.closing(self._connect()) as client:
                while not self._stopped.wait(0.01):
                    self._sample(client)
            self._stopped.wait(0.05)

    def _sample(self, client: Any) -> None:
        for tenant in self._tenants:
            prefix = f"ktrdr:{{{tenant}}}:w:"
            for budget, limit in self._capped.items():
                for window in ("ever",) if budget == "jobs" else self._days():
                    name = stored_window(window, "slots,ever,UTC,slots" if budget == "jobs" else "usd,day,UTC,spend")
                    figures = client.hmget(f"{prefix}{budget}:{name}", "spent", "held", "unconfirmed")
                    self.excess = max(self.excess, sum(int(figure or 0) for figure in figures) - limit)

    @staticmethod
    def _days() -> Iterator[str]:
        today = datetime.now(UTC).date()
        for days in range(-1, 3):
            yield f"{today + timedelta(days=days):%Y-%m-%d}"

    def stop(self) -> None:
        """Stop after one last sample."""
        self._stopped.set()
        self.join(60)
        with suppress(*_UNREACHABLE), contextlib.closing(self._connect()) as client:
            self._sample(client)


def play(row: Row, seed: int, seconds: float, directory: Path, *, quick: bool = False) -> Figures:
    """Run one row, from the first server to the verdict."""
    with Bench(row, seed, seconds, directory, quick=quick) as bench:
        row.run(bench)
        return bench.settle()
