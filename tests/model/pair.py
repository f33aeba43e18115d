"""The real system and the reference model side by side: each call is made on both, and the replies are compared."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import NamedTuple

from hypothesis import note

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetError, BudgetLimiter

from ..helpers.keyspace import window_key
from .histories import BUDGETS, BY_NAME
from .observed import NOISE_MS, RawStore, agree, all_units, fields, retry_after_agrees, stamp
from .reference import CLOSED, Grant, HoldModel, Reference, Refused, Settled, units_of
from .threaded import Threaded

STATUS_FIELDS = (
    *("window", "resets_at", "limit", "spent", "held", "unconfirmed", "remaining", "events", "overruns"),
    *("limit_source", "limit_until", "configured_limit"),
)
VIEW_FIELDS = (
    *("id", "state", "amounts", "accrued", "charged", "windows", "on_expiry", "created_at", "expires_at"),
    *("operation", "released_by_operator"),
)
DENIAL_FIELDS = ("budget", "reason", "limit", "spent", "held", "unconfirmed", "remaining", "requested", "fits")
SETTLED_FIELDS = ("state", "amounts", "replayed", "overrun", "late")
GRANT_FIELDS = ("id", "state", "amounts", "accrued", "windows", "expires_at")


class Call(NamedTuple):
    """A call to a replica (`make`), and the same call on the model (`expect`); `requested`: budgets to reserve."""

    replica: int
    make: Callable[[AsyncBudgetLimiter], Awaitable]
    expect: Callable[[], object]
    requested: tuple[str, ...] = ()


def units_by_name(amounts: Mapping) -> dict[str, int]:
    """A mapping as a caller writes it, in whole units."""
    return {name: units_of(amount, BY_NAME[name].unit) for name, amount in amounts.items()}


def amounts_in_units(given, names) -> object:
    """Amounts for the model: None, a scalar in whole units, or a mapping to whole units."""
    if given is None or isinstance(given, Mapping):
        return given if given is None else units_by_name(given)
    return units_of(given, "usd" if any(BY_NAME[name].unit == "usd" for name in names) else "count")


class Pair:
    """One to three replicas on a real server with a frozen clock, and the model of their tenant."""

    def __init__(self, server, runner: asyncio.Runner, start: datetime) -> None:
        self.server, self.runner = server, runner
        self.client = server.client()
        self.client.flushall()
        self.limiters: list[AsyncBudgetLimiter | Threaded] = []
        self._is_concurrent = False
        server.set(start, frozen=True)
        self.model = Reference(BUDGETS, int(start.timestamp() * 1000))

    def close(self) -> None:
        for limiter in self.limiters:
            self.runner.run(limiter.close())
        self.client.close()

    def start_replica(self, limits: Mapping) -> None:
        """Start a replica with these configured limits; the second one is synchronous."""
        budgets = [
            Budget(b.name, limits[b.name], b.unit, b.period, b.timezone, "slots" if b.slots else "spend")
            for b in BUDGETS
        ]
        limiter: AsyncBudgetLimiter | Threaded
        if len(self.limiters) == 1:
            limiter = Threaded(BudgetLimiter(self.server.url, budgets, timeout=30))
        else:
            limiter = AsyncBudgetLimiter(self.server.url, budgets, timeout=30)
        self.runner.run(limiter.start())
        self.limiters.append(limiter)
        self.model.configured.append(
            {b.name: None if limits[b.name] is None else units_of(limits[b.name], b.unit, down=True) for b in BUDGETS}
        )
        self.advance(2 * NOISE_MS)  # else its start may be in the future, by the noise of the clock

    def advance(self, milliseconds: int) -> None:
        """Advance the clock; a little further if the new time would be within the clock's noise of an event."""
        while any(abs(self.model.now_ms + milliseconds - at) < 100 for at in self.model.instants()):
            milliseconds += 200
        self.model.advance(milliseconds)
        self.server.advance(milliseconds / 1000)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def real(self, call: Awaitable):
        """Make a call on the real system; return its reply or error."""

        async def reply():
            try:
                return await call
            except BudgetError as error:
                return error

        return self.runner.run(reply())

    def both(self, number: int, make: Callable, expect: Callable):
        """Make one call on both systems; return both replies or errors."""
        return self.alike(self.real(make(self.limiters[number])), expect)

    def alike(self, real, expect: Callable):
        """Compare a real reply with that of the model; return both."""
        try:
            model = expect()
        except Refused as refused:
            model = refused
        note(f"# {str(real)[:150]}")
        if isinstance(model, Refused):
            assert type(real).__name__ == model.kind, (real, model)
            if model.kind == "BudgetExceeded":
                self._compare_denials(real, dict(model.figures))
        elif isinstance(real, BaseException):
            raise AssertionError(f"expected {model!r}") from real
        elif isinstance(model, Settled):
            agree(fields(real, SETTLED_FIELDS), {name: getattr(model, name) for name in SETTLED_FIELDS})
            # It may include a budget in which another process has grown the hold.
            assert set(model.overruns) <= set(real.overruns), (real, model)
        elif isinstance(model, Grant):
            view = self.model.view(model.hold.id)
            shown = {name: view[name] for name in GRANT_FIELDS}
            agree(
                {**fields(real, shown), "replayed": real.replayed, "cap_checked": real.cap_checked},
                {**shown, "replayed": model.replayed, "cap_checked": True},
            )
        elif isinstance(model, HoldModel) and real is not None:  # a hold object's extend returns nothing
            agree(fields(real, VIEW_FIELDS), self.model.view(model.id))
        return real, model

    def _compare_denials(self, real, expected: dict) -> None:
        waits_ms = expected.pop("retry_after_ms"), expected.pop("known_after_ms")
        figures = fields(real, DENIAL_FIELDS)
        for name in ("spent", "held", "unconfirmed"):
            # Sums above 2**53 are reported to within a few units.
            if expected[name] > CLOSED and abs(figures[name] - expected[name]) <= 4:
                figures[name] = expected[name]
        agree(figures, expected)
        if self._is_concurrent and expected["reason"] == "budget_held":
            return  # ``retry_after`` comes from a second read, before which other calls may have changed it
        agrees = any(retry_after_agrees(real.retry_after, each) for each in waits_ms)
        assert agrees, (real.retry_after, waits_ms, expected)

    def at_once(self, calls: list[Call]) -> None:
        """Make calls concurrently, and check that some order of their decisions explains all replies.

        The order is usually the given one. It may differ if a call needed a second request, because its window had
        ended or because due holds took the room.
        """

        async def together():
            return await asyncio.gather(
                *(call.make(self.limiters[call.replica]) for call in calls), return_exceptions=True
            )

        replies = self.runner.run(together())
        self._is_concurrent = True
        try:
            self._explain(calls, replies)
        finally:
            self._is_concurrent = False

    def _explain(self, calls: list[Call], replies: list) -> None:
        before = copy.deepcopy(self.model)
        failures: list[AssertionError] = []
        for order in itertools.islice(itertools.permutations(range(len(calls))), 720):
            try:
                for place in order:
                    self.alike(replies[place], calls[place].expect)
                self._compare_states()
            except AssertionError as error:
                failures.append(error)
                self.model = copy.deepcopy(before)
                continue
            if failures:
                self._apply_limits(calls)
            return
        raise failures[0]

    def _compare_states(self) -> None:
        """Check states and deadlines. If two calls changed a hold, only the stored record shows the later change."""
        for known, (state, deadline_ms) in RawStore(self.client).states().items():
            hold = self.model.holds.get(known)
            assert hold is not None, known
            due = state == "open" and deadline_ms <= self.model.now_ms
            assert hold.state == ("unconfirmed" if due else state), (hold, state)
            assert state != "open" or abs(hold.deadline_ms - deadline_ms) <= NOISE_MS, (hold, deadline_ms)

    def _apply_limits(self, calls: list[Call]) -> None:
        """Take limits from the store: if a call needed two requests, its first request may have asserted a limit."""
        for number, name in {(call.replica, name) for call in calls for name in call.requested}:
            window = self.model.window(name)
            limit = self.model.configured[number][name]
            stored = self.client.hget(window_key(self.client, name, window.name), "limit")
            if window.asserted_by >= 0 and stored == ("-" if limit is None else str(limit)):
                self.model.assert_limit(window, number)

    # -- reads ---------------------------------------------------------------------------------------------------------

    def compare_status(self, number: int, name: str) -> None:
        status = self.runner.run(self.limiters[number].status(name))
        agree(fields(status, STATUS_FIELDS), self.model.status(number, name))

    def compare_everything(self, number: int, page: int) -> None:
        """Compare all statuses, holds and ledger entries, read in pages of this size."""
        limiter = self.limiters[number]
        for status in self.runner.run(limiter.statuses()):
            agree(fields(status, STATUS_FIELDS), self.model.status(number, status.budget))
        for name in BY_NAME:
            self._compare_holds(limiter, name, page)
        for (name, window), known in self.model.windows.items():
            entries = self._pages(lambda cursor, n=name, w=window: limiter.ledger(n, w, limit=page, cursor=cursor))
            # Ordered by number: by the noise of the clock, an entry may have an earlier time than its predecessor.
            assert [int(entry.entry_id) for entry in entries] == list(range(len(entries), 0, -1))
            times_ms = [stamp(entry.at) for entry in entries]
            assert all(newer >= older - NOISE_MS for newer, older in itertools.pairwise(times_ms))
            real = [(e.kind, e.hold_id, *all_units({"": e.amount}).values(), e.operation) for e in entries]
            assert sorted(real) == sorted(known.ledger), (name, window, real, known.ledger)

    def compare_hold(self, number: int, known: str) -> None:
        """Compare a hold by id, in any state."""
        real, model = self.both(number, lambda limiter: limiter.get(known), lambda: self.model.view(known))
        if not isinstance(model, Refused):
            agree(fields(real, VIEW_FIELDS), model)

    def _compare_holds(self, limiter: AsyncBudgetLimiter | Threaded, name: str, page: int) -> None:
        real = [fields(v, VIEW_FIELDS) for v in self._pages(lambda c: limiter.holds(name, limit=page, cursor=c))]
        model = self.model.listed(name)
        assert [view["state"] for view in real] == [view["state"] for view in model], (name, real, model)
        by_id = {view["id"]: view for view in model}
        assert len(real) == len(by_id)
        for view in real:
            agree(view, by_id[view["id"]])
        deadlines = [view["expires_at"] for view in real if view["state"] == "open"]
        assert deadlines == sorted(deadlines, reverse=True)

    def _pages(self, read: Callable) -> list:
        found, cursor = [], None
        while True:
            page = self.runner.run(read(cursor))
            found += page
            cursor = page.next_cursor
            if cursor is None:
                return found

    # -- invariants ----------------------------------------------------------------------------------------------------

    def check_hard_cap(self, hold: HoldModel) -> None:
        """Check P1 in each window that a granted reservation touched."""
        store = RawStore(self.client)
        for name, part in hold.parts.items():
            limit = self.model.limit(part.window)
            assert limit is None or sum(store.sums(f"{name}:{part.window.name}").values()) <= limit

    def check_store(self) -> None:
        """Check P11 and P7."""
        store = RawStore(self.client)
        store.check_it_adds_up()
        store.check_keys_expire()
