"""The reference model: the effect of each call by the contract, in plain Python.

It follows the contract, not the scripts: whole units, eager expiry, no batches, no caches, one clock that the test
sets. It imports nothing of the package. Amounts are whole units (nano-dollars, or counts), instants are milliseconds
since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from zoneinfo import ZoneInfo

DAY_MS = 86_400_000
CLOSED = 2**53
"""A window whose sum reaches this many units admits nothing. So an uncapped budget admits up to one unit less."""
LONGEST_HOLD_MS = DAY_MS
ID_MEMORY_MS = DAY_MS


# -- refusals ----------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A refusal, which changes nothing; `kind` is the class of the error in the package."""

    def __init__(self, kind: str, **figures) -> None:
        super().__init__(kind, figures)
        self.kind = kind
        self.figures = figures


# -- amounts and windows -----------------------------------------------------------------------------------------------


def units_of(amount, unit: str, *, down: bool = False) -> int:
    """The amount in whole units, by exact arithmetic on its text; amounts are rounded up, limits down."""
    exact = Fraction(repr(amount) if isinstance(amount, float) else str(amount))
    scaled = exact * 10**9 if unit == "usd" else exact
    return scaled.__floor__() if down else scaled.__ceil__()


def window_name(period: str, timezone: str, at_ms: int) -> str:
    """The name of the window at an instant."""
    utc = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at_ms)
    local = utc.astimezone(ZoneInfo(timezone))
    if period == "hour":
        return utc.strftime("%Y-%m-%dT%HZ")
    return local.strftime({"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m", "ever": "ever"}[period])


def window_bounds(period: str, timezone: str, at_ms: int) -> tuple[int, int | None]:
    """The first instant of the window and the first one after it, found by bisection on the name."""
    if period == "ever":
        return 0, None
    name = window_name(period, timezone, at_ms)
    known = _bounds.get((period, timezone, name))
    if known is None:
        known = _bounds[period, timezone, name] = _find_bounds(period, timezone, name, at_ms)
    return known


_bounds: dict[tuple[str, str, str], tuple[int, int]] = {}
"""The bounds found so far. A bisection takes milliseconds, and each step of a history needs all bounds."""


def _find_bounds(period: str, timezone: str, name: str, at_ms: int) -> tuple[int, int]:
    def change(inside: int, outside: int) -> int:
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            if window_name(period, timezone, middle) == name:
                inside = middle
            else:
                outside = middle
        return max(inside, outside)

    return change(at_ms, at_ms - 40 * DAY_MS), change(at_ms, at_ms + 40 * DAY_MS)


@dataclass(frozen=True)
class BudgetModel:
    """The definition of a budget; limits belong to replicas."""

    name: str
    unit: str = "usd"
    period: str = "day"
    timezone: str = "UTC"
    slots: bool = False


@dataclass
class WindowModel:
    """One budget in one period."""

    budget: BudgetModel
    name: str
    ends_ms: int | None
    spent: int = 0
    held: int = 0
    unconfirmed: int = 0
    events: int = 0
    overruns: int = 0
    asserted: int | None = None
    asserted_by: int = -1
    """The number of the replica that asserted the configured limit, in the order of start; -1 if none has done so."""
    ledger: list[tuple[str, str, int, str]] = field(default_factory=list)
    """(kind, hold id, signed amount, operation), oldest first."""

    @property
    def total(self) -> int:
        return self.spent + self.held + self.unconfirmed


@dataclass
class Part:
    """The amounts of a hold in one window."""

    window: WindowModel
    requested: int
    reserved: int
    accrued: int = 0
    charged: int = 0

    @property
    def slots(self) -> bool:
        return self.window.budget.slots

    @property
    def weight(self) -> int:
        """The units that count as held while the hold is open."""
        return self.reserved if self.slots else max(self.reserved, self.accrued)


@dataclass
class HoldModel:
    """A hold or a recorded spend, as stored."""

    id: str
    parts: dict[str, Part]
    on_expiry: str
    created_ms: int
    deadline_ms: int
    operation: str = ""
    state: str = "open"
    by_operator: bool = False
    settled_ms: int | None = None
    journalled_ms: int | None = None
    """The time of the first settlement, if a data loss has changed ``settled_ms``."""
    serial: int = 0
    """Distinguishes holds with the same id: the store drops an id some time after its settlement."""

    @property
    def resolved(self) -> bool:
        """Whether the hold is settled for good. Expiry and a release by an operator are not final."""
        return self.state in ("committed", "recorded") or (self.state == "released" and not self.by_operator)


@dataclass
class Grant:
    """A reply to reserve."""

    hold: HoldModel
    replayed: bool


@dataclass
class Settled:
    """A reply to commit, release or record; in a replay, the flags are unset."""

    state: str
    amounts: dict[str, int]
    replayed: bool = False
    overruns: tuple[str, ...] = ()
    late: bool = False

    @property
    def overrun(self) -> bool:
        return bool(self.overruns)


@dataclass
class Worker:
    """The totals of a hold object in its process, which may lag behind the store's."""

    id: str
    serial: int
    windows: dict[str, str]
    reserved: dict[str, int]
    accrued: dict[str, int]
    ttl_ms: int
    settled: bool = False


# -- the model ---------------------------------------------------------------------------------------------------------


class Reference:
    """One tenant. Each method makes one call at `now_ms` and returns the expected reply or raises `Refused`."""

    def __init__(self, budgets: list[BudgetModel], now_ms: int) -> None:
        self.budgets = {budget.name: budget for budget in budgets}
        self.now_ms = now_ms
        self.windows: dict[tuple[str, str], WindowModel] = {}
        self.holds: dict[str, HoldModel] = {}
        self.runtime: dict[str, tuple[int | None, int | None]] = {}
        """The limit set at run time for each budget, and the end of this limit; None means uncapped, or without end."""
        self.configured: list[dict[str, int | None]] = []
        """The configured limits of each replica, in the order of start."""
        self.grants = 0

    # -- time ----------------------------------------------------------------------------------------------------------

    def advance(self, milliseconds: int) -> None:
        """Advance the clock: holds expire, settled ids are dropped, run-time limits end."""
        self.now_ms += milliseconds
        self._expire_due()
        self.holds = {hold.id: hold for hold in self.holds.values() if not self._is_dropped(hold)}
        for name in [name for name, (_, until) in self.runtime.items() if until is not None and until <= self.now_ms]:
            del self.runtime[name]

    def instants(self) -> set[int]:
        """The instants of known future events: deadlines, ends of windows and limits, removal of ids."""
        found = {hold.deadline_ms for hold in self.holds.values() if hold.state == "open"}
        found |= {hold.settled_ms + ID_MEMORY_MS for hold in self.holds.values() if hold.settled_ms is not None}
        found |= {until for _, until in self.runtime.values() if until is not None}
        for budget in self.budgets.values():
            end = window_bounds(budget.period, budget.timezone, self.now_ms)[1]
            found |= set() if end is None else {end}
        return found

    def _expire_due(self) -> None:
        due = [hold for hold in self.holds.values() if hold.state == "open" and hold.deadline_ms <= self.now_ms]
        for hold in sorted(due, key=lambda hold: hold.deadline_ms):
            hold.state = "unconfirmed"
            for part in hold.parts.values():
                part.window.held -= part.weight
                if part.slots or hold.on_expiry == "release":
                    part.charged = 0
                else:
                    part.charged = part.weight if hold.on_expiry == "charge" else part.accrued
                part.window.unconfirmed += part.charged
                if part.charged:
                    part.window.events += 1
                    self._enter(part, "expiry", hold, part.charged)

    def _is_dropped(self, hold: HoldModel) -> bool:
        return hold.settled_ms is not None and hold.settled_ms + ID_MEMORY_MS <= self.now_ms

    @staticmethod
    def _enter(part: Part, kind: str, hold: HoldModel, amount: int) -> None:
        part.window.ledger.append((kind, hold.id, amount, hold.operation))

    # -- windows and limits --------------------------------------------------------------------------------------------

    def window(self, name: str) -> WindowModel:
        """The current window; a new one is not stored yet."""
        budget = self.budgets[name]
        key = window_name(budget.period, budget.timezone, self.now_ms)
        found = self.windows.get((name, key))
        return found or WindowModel(budget, key, window_bounds(budget.period, budget.timezone, self.now_ms)[1])

    def limit(self, window: WindowModel, replica: int | None = None) -> int | None:
        """The limit in force; with `replica`, the limit after this replica has asserted its configured limit."""
        name = window.budget.name
        if name in self.runtime:
            return self.runtime[name][0]
        if replica is not None and replica >= window.asserted_by:
            return self.configured[replica][name]
        return window.asserted

    def _keep(self, window: WindowModel) -> None:
        self.windows[window.budget.name, window.name] = window

    def assert_limit(self, window: WindowModel, replica: int) -> None:
        """Assert a configured limit. The limit of the replica that started last stays in force."""
        if replica >= window.asserted_by:
            window.asserted, window.asserted_by = self.configured[replica][window.budget.name], replica

    def _check_room(
        self, needs: list[tuple[WindowModel, int, int, int | None]], hold: HoldModel | None = None, weight: Mapping = {}
    ) -> None:
        """Raise `Refused` for the first window without room, in the order given.

        Args:
            needs: each window with the units to admit, the units counted without admission, and the limit in force.
            hold: the hold to grow, if any.
            weight: the units that the grown hold would count, by budget.
        """
        for window, need, fact, limit in needs:
            cap = CLOSED - 1 if limit is None else limit
            if need and (window.total + fact + need > cap or window.total >= CLOSED):
                raise Refused("BudgetExceeded", **self._denial(window, need, cap, hold, weight))

    def _denial(
        self, window: WindowModel, requested: int, limit: int, hold: HoldModel | None, weight: Mapping[str, int]
    ) -> dict:
        if max(requested, weight.get(window.budget.name, 0)) > limit:
            reason = "exceeds_limit"
        elif window.spent + window.unconfirmed + requested <= limit:
            reason = "budget_held"
        else:
            reason = "budget_exhausted"
        remaining = 0 if window.total >= CLOSED else max(0, limit - window.total)
        returns = [] if window.ends_ms is None or reason == "exceeds_limit" else [window.ends_ms]
        held = reason == "budget_held"
        return {
            "budget": window.budget.name,
            "reason": reason,
            "limit": limit,
            "spent": window.spent,
            "held": window.held,
            "unconfirmed": window.unconfirmed,
            "remaining": remaining,
            "requested": requested,
            "fits": remaining,
            "retry_after_ms": self._until_first(returns + self._first_return(window, hold, 128) * held),
            "known_after_ms": self._until_first(returns + self._first_return(window, hold, len(self.holds)) * held),
        }

    def _until_first(self, returns: list[int]) -> int | None:
        return min(returns) - self.now_ms if returns else None

    def _first_return(self, window: WindowModel, but: HoldModel | None, searched: int) -> list[int]:
        """The next deadline of another open hold of the window, among the ``searched`` open holds that are due first.

        A replica searches 128 holds. It may have cached the deadline at a time when there were fewer.
        """
        due = [hold for hold in self.holds.values() if hold.state == "open"]
        due = sorted(due, key=lambda hold: (hold.deadline_ms, hold.id))[:searched]
        found = [
            hold.deadline_ms
            for hold in due
            if hold is not but and any(part.window is window for part in hold.parts.values())
        ]
        if not found and len(due) == 128 and window.ends_ms is None:
            return [due[-1].deadline_ms]  # a lower bound
        return found[:1]

    # -- reserve and record --------------------------------------------------------------------------------------------

    def reserve(
        self, replica: int, amounts: Mapping[str, int], id: str, ttl_ms: int, on_expiry: str, operation: str = ""
    ) -> Grant:
        """Reserve in all budgets or none; a known id with the same contents is a replay in any state."""
        windows = {name: self.window(name) for name in amounts}
        known = self.holds.get(id)
        if known:
            return self._replay(known, amounts, on_expiry)
        try:
            self._check_room(
                [(windows[name], amount, 0, self.limit(windows[name], replica)) for name, amount in amounts.items()]
            )
        except Refused:
            # A denial writes only a changed limit, so that older replicas do not spend by the former one.
            for window in windows.values():
                if window.asserted_by >= 0 and window.asserted != self.configured[replica][window.budget.name]:
                    self.assert_limit(window, replica)
            raise
        parts = {name: Part(windows[name], amount, amount) for name, amount in amounts.items()}
        for part in parts.values():
            self._keep(part.window)
            self.assert_limit(part.window, replica)
            part.window.held += part.reserved
        self.grants += 1
        hold = HoldModel(id, parts, on_expiry, self.now_ms, self.now_ms + ttl_ms, operation, serial=self.grants)
        self.holds[id] = hold
        return Grant(hold, replayed=False)

    @staticmethod
    def _replay(known: HoldModel, amounts: Mapping[str, int], on_expiry: str) -> Grant:
        requested = {name: part.requested for name, part in known.parts.items()}
        if known.state == "recorded" or requested != dict(amounts) or known.on_expiry != on_expiry:
            raise Refused("HoldConflict")
        return Grant(known, replayed=True)

    def record(self, amounts: Mapping[str, int], id: str, operation: str = "") -> Settled:
        """Record spend. The amount is already spent, so the call is never refused for lack of room."""
        known = self.holds.get(id)
        if known:
            if known.state != "recorded" or {name: part.requested for name, part in known.parts.items()} != dict(
                amounts
            ):
                raise Refused("HoldConflict")
            return Settled("recorded", dict(amounts), replayed=True)
        parts = {name: Part(self.window(name), amount, amount) for name, amount in amounts.items()}
        hold = HoldModel(id, parts, "charge", self.now_ms, self.now_ms, operation, "recorded")
        hold.settled_ms = self.now_ms
        for part in parts.values():
            self._keep(part.window)
            self._spend(hold, part, "record", part.reserved)
        self.holds[id] = hold
        return Settled("recorded", dict(amounts))

    # -- settle --------------------------------------------------------------------------------------------------------

    def commit(self, id: str, amounts: object = None, accrued: Mapping[str, int] | None = None) -> Settled:
        """`amounts`: None, a scalar in units, or a mapping of units; `accrued`: the worker's own totals."""
        hold = self._known(id)
        actual = self._actual(hold, amounts, accrued or {})
        overruns = tuple(name for name, part in hold.parts.items() if not part.slots and actual[name] > part.reserved)
        if hold.state == "committed":
            if actual != {name: part.charged for name, part in hold.parts.items()}:
                raise Refused("HoldConflict")
            return Settled("committed", actual, replayed=True)
        if hold.resolved:
            raise Refused("HoldConflict")
        late = hold.state != "open"
        for name, part in hold.parts.items():
            self._charge(hold, part, actual[name])
        self._settle(hold, "committed")
        return Settled("committed", actual, False, overruns, late)

    def commit_mine(self, worker: Worker, amounts: object = None) -> Settled:
        """Commit by the hold object. If its settled id was dropped, the hold is unknown and is not charged again."""
        settled = self.commit(worker.id, amounts, worker.accrued)
        worker.settled = True
        return settled

    def release_mine(self, worker: Worker) -> Settled:
        """Release by the hold object."""
        settled = self.release(worker.id)
        worker.settled = True
        return settled

    def leave(self, worker: Worker, *, failed: bool, keep: bool) -> None:
        """Apply the end of `with limiter.hold(…)`; `keep` stands for on_error="charge"."""
        if worker.settled:
            return
        used = any(worker.accrued.values())
        if failed and keep:
            if used:  # kept until its deadline, with its accrued amounts
                self.extend(worker.id, worker.ttl_ms, worker.accrued, keep=True)
        elif used:
            self.commit_mine(worker)
        elif self.holds[worker.id].resolved:  # by id, and nothing was accrued
            worker.settled = True
        elif failed:
            self.release_mine(worker)
        else:
            self.commit_mine(worker, {name: part.reserved for name, part in self.holds[worker.id].parts.items()})

    def _actual(self, hold: HoldModel, amounts: object, local: Mapping[str, int]) -> dict[str, int]:
        accrued = {name: max(part.accrued, local.get(name, 0)) for name, part in hold.parts.items()}
        if isinstance(amounts, Mapping):
            if not amounts.keys() <= hold.parts.keys():
                raise Refused("UnknownBudget")
            actual = {name: amounts.get(name, 0) for name in hold.parts}
        elif amounts is not None:
            given = self.spread(hold.parts, amounts)
            actual = {name: given.get(name, part.reserved) for name, part in hold.parts.items()}
        elif any(accrued.values()):
            # A report in dollars leaves counts at their reserved amounts.
            actual = {
                name: accrued[name] if accrued[name] or self._dollars(name) else part.reserved
                for name, part in hold.parts.items()
            }
        else:
            actual = dict.fromkeys(hold.parts, 0)
        return {name: 0 if part.slots else actual[name] for name, part in hold.parts.items()}

    def _dollars(self, name: str) -> bool:
        return self.budgets[name].unit == "usd"

    def _charge(self, hold: HoldModel, part: Part, actual: int) -> None:
        window = part.window
        if part.slots:
            window.held -= part.weight if hold.state == "open" else 0
            return
        window.overruns += actual > part.reserved
        if hold.state == "open":
            window.held -= part.weight
            self._spend(hold, part, "commit", actual)
        else:
            window.unconfirmed -= part.charged
            self._spend(hold, part, "correction", actual)

    def _spend(self, hold: HoldModel, part: Part, kind: str, actual: int) -> None:
        """Count an amount as spent; the ledger entry is its difference to the previous charge."""
        self._enter(part, kind, hold, actual - part.charged)
        part.window.spent += actual
        part.window.events += 1
        part.charged = actual

    def release_by_id(self, id: str, *, operator: bool = False) -> Settled:
        """Release by id; an unresolved hold can still be committed by its worker."""
        known = self.holds.get(id)
        unresolved = known is not None and (known.state == "unconfirmed" or known.by_operator)
        return self.release(id, operator=operator or unresolved)

    def release(self, id: str, *, operator: bool = False) -> Settled:
        """Release all amounts."""
        hold = self._known(id)
        nothing = dict.fromkeys(hold.parts, 0)
        if hold.state == "released" and (operator or not hold.by_operator):
            return Settled("released", nothing, replayed=True)
        if hold.resolved:
            raise Refused("HoldConflict")
        late = hold.state != "open"
        for part in hold.parts.values():
            if hold.state == "open":
                part.window.held -= part.weight
            elif part.charged:
                part.window.unconfirmed -= part.charged
                self._enter(part, "release", hold, -part.charged)
            part.charged = 0
        self._settle(hold, "released")
        if operator:  # not resolved: the worker may still commit
            hold.by_operator, hold.settled_ms = True, None
        return Settled("released", nothing, False, (), late)

    def _settle(self, hold: HoldModel, state: str) -> None:
        hold.state, hold.settled_ms, hold.by_operator = state, self.now_ms, False

    def _known(self, id: str) -> HoldModel:
        if id not in self.holds:
            raise Refused("UnknownHold")
        return self.holds[id]

    # -- extend and grow -----------------------------------------------------------------------------------------------

    def extend(
        self,
        id: str,
        ttl_ms: int,
        accrued: Mapping[str, int] | None = None,
        totals: Mapping[str, int] | None = None,
        *,
        keep: bool = False,
    ) -> HoldModel:
        """Apply a heartbeat with total `accrued`, or growth to `totals`; `keep`: an open hold keeps its deadline."""
        hold = self._known(id)
        accrued, totals = accrued or {}, totals or {}
        if not (accrued.keys() | totals.keys()) <= hold.parts.keys():
            raise Refused("UnknownBudget")
        if hold.resolved or hold.by_operator:  # a heartbeat does not undo a release by an operator
            raise Refused("HoldConflict")
        deadline = min(self.now_ms + ttl_ms, hold.created_ms + LONGEST_HOLD_MS)
        expired = hold.state != "open"
        if expired and deadline <= self.now_ms:
            raise Refused("HoldConflict")
        needs = []
        for name, part in hold.parts.items():
            grown = Part(part.window, part.requested, max(part.reserved, totals.get(name, 0)), part.accrued)
            if not part.slots:
                grown.accrued = max(part.accrued, accrued.get(name, 0))
            counted = part.charged if expired else part.weight
            # Reported spend is a fact and needs no admission; growth beyond it does.
            fact = max(0, grown.accrued - counted)
            needs.append((part.window, max(0, grown.weight - counted - fact), fact, self.limit(part.window)))
        weight = {
            name: max(part.reserved, totals.get(name, 0), 0 if part.slots else max(part.accrued, accrued.get(name, 0)))
            for name, part in hold.parts.items()
        }
        self._check_room(needs, hold, weight)
        for name, part in hold.parts.items():
            if expired:
                self._revive(hold, part)
            before = part.weight
            part.reserved = max(part.reserved, totals.get(name, 0))
            if not part.slots:
                part.accrued = max(part.accrued, accrued.get(name, 0))
            part.window.held += part.weight - before
        hold.state = "open"
        if expired or not keep:
            hold.deadline_ms = deadline
        return hold

    def grow_mine(self, worker: Worker, more: Mapping[str, int]) -> HoldModel:
        """Grow by the hold object: add `more` to the reserved amount, which includes growth by other callers."""
        known = self.holds.get(worker.id)
        if known is None or known.resolved or known.by_operator:
            return self.extend(worker.id, worker.ttl_ms, keep=True)  # refused
        totals = {name: known.parts[name].reserved + units for name, units in more.items()}
        if max(totals.values(), default=0) >= CLOSED:
            raise Refused("InvalidAmount")
        return self.extend(worker.id, worker.ttl_ms, totals=totals, keep=True)

    def _revive(self, hold: HoldModel, part: Part) -> None:
        part.window.unconfirmed -= part.charged
        part.window.held += part.weight
        if part.charged:
            self._enter(part, "revival", hold, -part.charged)
        part.charged = 0

    # -- limits and reads ----------------------------------------------------------------------------------------------

    def set_limit(self, name: str, limit: int | None, until: int | str | None) -> None:
        """Set a run-time limit; `until`: milliseconds, `window`, or None for no end."""
        self.runtime[name] = (limit, self.window(name).ends_ms if until == "window" else until)

    def clear_limit(self, name: str) -> None:
        """Return to the configured limit."""
        self.runtime.pop(name, None)

    def status(self, replica: int, name: str) -> dict:
        """The figures of the current window; a read asserts no limit."""
        window = self.window(name)
        own = self.configured[replica][name]
        limit = self.limit(window, replica)
        return {
            "window": window.name,
            "resets_at": window.ends_ms,
            "limit": limit,
            "spent": window.spent,
            "held": window.held,
            "unconfirmed": window.unconfirmed,
            "remaining": None if limit is None else max(0, limit - window.total),
            "events": window.events,
            "overruns": window.overruns,
            "limit_source": "runtime" if name in self.runtime else "configured",
            "limit_until": self.runtime[name][1] if name in self.runtime else None,
            "configured_limit": own,
        }

    def view(self, id: str) -> dict:
        """The public view of a hold."""
        hold = self._known(id)
        parts = hold.parts.items()
        return {
            "id": hold.id,
            "state": hold.state,
            "amounts": {name: part.reserved for name, part in parts},
            "accrued": {name: part.accrued for name, part in parts},
            "charged": {name: part.charged for name, part in parts},
            "windows": {name: part.window.name for name, part in parts},
            "on_expiry": hold.on_expiry,
            "created_at": hold.created_ms,
            "expires_at": hold.deadline_ms,
            "operation": hold.operation,
            "released_by_operator": hold.by_operator,
        }

    def listed(self, name: str) -> list[dict]:
        """The holds of a budget: open, then unconfirmed ones, latest deadline first."""
        mine = [hold for hold in self.holds.values() if name in hold.parts and hold.state in ("open", "unconfirmed")]
        mine.sort(key=lambda hold: (hold.state != "open", -hold.deadline_ms))
        return [self.view(hold.id) for hold in mine]

    # -- hold objects --------------------------------------------------------------------------------------------------

    def worker(self, grant: Grant, ttl_ms: int) -> Worker:
        """The hold object that a reservation returns."""
        parts = grant.hold.parts.items()
        return Worker(
            grant.hold.id,
            grant.hold.serial,
            {name: part.window.name for name, part in parts},
            {name: part.reserved for name, part in parts},
            {name: part.accrued for name, part in parts},
            ttl_ms,
            grant.hold.resolved,
        )

    def spread(self, names: Iterable[str], amount: object) -> dict[str, int]:
        """Amounts by budget. A scalar applies to all budgets in dollars; if there are none, to the only count."""
        if isinstance(amount, Mapping):
            return dict(amount)
        dollars = [name for name in names if self.budgets[name].unit == "usd"]
        return dict.fromkeys(dollars or [name for name in names if not self.budgets[name].slots], amount)
