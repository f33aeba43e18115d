"""Compares a complete history with the reference model and with the final contents of the store.

A history does not show the order of the store's decisions, but each decision lies between the begin and the end of its
call. So every grant is checked against the units that certainly counted then, and every denial against all units that
may have counted. The final contents are compared with the model after the calls of each id. A call with an unknown
outcome counts as executed if the store shows it. All amounts are whole units.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from ..model.reference import BudgetModel, Reference, Refused
from .history import ACKNOWLEDGED, NO_REPLY, REFUSED, Books, Call, IdHistory, Stored, histories_by_id, split_drawn

NANOS = 10**9
FOREVER = float("inf")
_CLOCK_NOISE_MS = 100
_CLOCK_NOISE_NS = 300 * 10**6


@dataclass
class Terms:
    """The limits of a run, and the deviations that its fault explains."""

    limits: Mapping[str, int | None]
    timeout_s: float
    slots: frozenset[str] = frozenset({"jobs"})
    tolerance_s: float = 0.5
    """Accepted lateness of a call in its caller's measurement, because the replicas share the cores of the machine."""
    lateness_max_s: float = 0.25
    """Accepted lateness without the stalls of the process."""
    steady_clock: bool = True
    """Whether the store's clock ran evenly; otherwise the due times of holds are unknown."""
    midnight_ns: int | None = None
    """Midnight of the store's clock, as a time of the histories' clock."""
    excess_max: int = 0
    """Units that may be granted above a limit because the store had lost data."""
    prepaid_units: int = 0
    """The most units of each budget that all leases together prepay; the store counts them, but no call shows them."""
    refusals: tuple[str, ...] = ()
    """Errors that this fault explains, besides an unreachable store."""


@dataclass
class Verdict:
    """The figures of a run, and its violations of promises."""

    operations: int = 0
    grants: int = 0
    spend: int = 0
    """Nano-dollars, over all windows."""
    overspend: int = 0
    """The largest excess over a limit after a grant; only units that certainly counted at the decision are included."""
    late: int = 0
    """Units committed after the hold had been released on expiry: a fact that no limit refuses (P2)."""
    lost: int = 0
    unknown: int = 0
    """Calls without a confirmation or a refusal."""
    resolved: int = 0
    """Unknown calls whose outcome the final contents show."""
    longest_s: float = 0.0
    late_s: float = 0.0
    """The longest running time of a process between the deadline and the end of a call."""
    windows: int = 0
    violations: list[str] = field(default_factory=list)

    def blame(self, text: str) -> None:
        self.violations.append(text)

    def add(self, other: Verdict) -> None:
        """Add the figures of another tenant."""
        for name in ("operations", "grants", "spend", "lost", "unknown", "resolved", "windows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.overspend = max(self.overspend, other.overspend)
        self.late = max(self.late, other.late)
        self.longest_s = max(self.longest_s, other.longest_s)
        self.late_s = max(self.late_s, other.late_s)
        self.violations += other.violations


def judge(calls: list[Call], books: Books, terms: Terms) -> Verdict:
    """Judge the history of one tenant."""
    verdict = Verdict(operations=len(calls), windows=sum(not name.endswith(":ever") for name in books.sums))
    others, drawn = split_drawn(calls, books.holds)
    histories = histories_by_id(others)
    everything = histories | drawn
    _check_deadlines_and_outcomes(calls, terms, verdict)
    _check_unrequested_ids(calls, histories, books, terms, verdict)
    _check_windows_around_midnight(everything, books, terms, verdict)
    _check_grants(everything, books, terms, verdict)
    _check_denials(calls, everything, books, terms, verdict)
    verdict.late = sum(
        max(history.settled.amounts.values(), default=0) for history in everything.values() if _is_late(history)
    )
    _compare_with_model(histories, books, verdict)
    if terms.prepaid_units:
        _check_chunks(drawn, histories, books, verdict)
    _check_ledgers(books, verdict)
    verdict.grants = sum(call.is_grant for call in calls)
    unknown = [call for call in calls if call.unknown]
    verdict.unknown = len(unknown)
    blamed = " ".join(verdict.violations)
    verdict.resolved = sum(call.id is None or f"'{call.id}'" not in blamed for call in unknown)
    usd = [sums["spent"] for name, sums in books.sums.items() if name.rpartition(":")[0] not in terms.slots]
    verdict.spend = sum(usd)
    return verdict


# -- calls -------------------------------------------------------------------------------------------------------------


def _check_deadlines_and_outcomes(calls: list[Call], terms: Terms, verdict: Verdict) -> None:
    known = (*ACKNOWLEDGED, *REFUSED, *NO_REPLY[:1], "killed", "cancelled", "unguarded", "prepaid", *terms.refusals)
    for call in calls:
        verdict.longest_s = max(verdict.longest_s, call.seconds)
        late_s = call.late_s(terms.timeout_s)
        verdict.late_s = max(verdict.late_s, late_s)
        if call.seconds > terms.timeout_s + terms.tolerance_s:
            verdict.blame(f"{call.name} of '{call.id}' took {call.seconds:.2f} s")
        elif late_s > terms.lateness_max_s:
            verdict.blame(f"{call.name} of '{call.id}' ended {late_s:.2f} s late, without a stall of its process")
        if call.outcome not in known:
            verdict.blame(f"{call.name} of '{call.id}' ended with {call.outcome}")


def _check_unrequested_ids(
    calls: list[Call], histories: dict[str, IdHistory], books: Books, terms: Terms, verdict: Verdict
) -> None:
    unnamed = any(call.id is None and call.unknown for call in calls)
    entered = {hold_id for window in books.entered.values() for hold_id, units in window.items() if units}
    for hold_id in sorted((books.holds.keys() | entered) - histories.keys() - {"-"}):
        record = books.holds.get(hold_id)
        if terms.prepaid_units and record is not None and (record.is_chunk or record.state == "recorded"):
            continue  # a chunk, or a late commit of a hold that was drawn from one: see _check_chunks
        if terms.prepaid_units and record is not None and record.is_tombstone:
            continue  # the reservation of a chunk did not arrive, and was released
        # An id generated by a limiter; its caller was killed or cancelled, or received no reply that shows it.
        if not unnamed or record is None or record.state not in ("released", "unconfirmed"):
            verdict.blame(f"'{hold_id}' is stored, but was never requested")


def _check_windows_around_midnight(
    histories: dict[str, IdHistory], books: Books, terms: Terms, verdict: Verdict
) -> None:
    """P8, P4: grants before midnight of the store use the first day's window, and later grants use the next window."""
    if terms.midnight_ns is None:
        return
    days = sorted({window for name in books.sums if (window := name.rpartition(":")[2]) != "ever"})
    before, after = set[str](), set[str]()
    for history in histories.values():
        first = min(call.began_ns for call in history.calls)
        acknowledged_ns = min(
            (c.ended_ns or FOREVER for c in history.of("reserve", "record") if c.acknowledged), default=FOREVER
        )
        paid = {window for window in _windows(history, books).values() if window != "ever"}
        if acknowledged_ns < terms.midnight_ns - _CLOCK_NOISE_NS:
            before |= paid
        elif first > terms.midnight_ns + _CLOCK_NOISE_NS:
            after |= paid
    if len(days) > 2 or before & after or before - set(days[:1]) or (before and after and after != set(days[1:])):
        verdict.blame(f"windows used before midnight: {sorted(before)}, after it: {sorted(after)}")


# -- the cap -----------------------------------------------------------------------------------------------------------


class _Sums:
    """Sums of the units of all points before an instant."""

    def __init__(self, points: Iterable[tuple[float, int]]) -> None:
        ordered = sorted(points)
        self._at = [at for at, _ in ordered]
        self._sums = [0, *accumulate(units for _, units in ordered)]

    def before(self, instant: float, *, including: bool = False) -> int:
        return self._sums[(bisect_right if including else bisect_left)(self._at, instant)]


class _Covering:
    """Returns the sum of the units of all intervals that cover a given interval; calls must be sorted by its begin."""

    def __init__(self, intervals: list[tuple[float, float, int]]) -> None:
        self._waiting = sorted(intervals, reverse=True)
        self._ends = sorted({-end for _, end, _ in intervals})
        self._tree = [0] * (len(self._ends) + 1)

    def units(self, began: float, ended: float) -> int:
        while self._waiting and self._waiting[-1][0] <= began:
            _, end, units = self._waiting.pop()
            at = bisect_left(self._ends, -end) + 1
            while at < len(self._tree):
                self._tree[at] += units
                at += at & -at
        total, at = 0, bisect_right(self._ends, -ended)
        while at:
            total += self._tree[at]
            at -= at & -at
        return total


def _windows(history: IdHistory, books: Books) -> dict[str, str]:
    """The window of each budget of an id, from its grant or from its record."""
    grant = history.granted
    if grant is not None and grant.windows:
        return grant.windows
    stored = books.holds.get(history.id)
    return {} if stored is None else {segment.budget: segment.window for segment in stored.segments}


def _check_grants(histories: dict[str, IdHistory], books: Books, terms: Terms, verdict: Verdict) -> None:
    """P1: the units of each grant and the units that certainly counted at its decision do not exceed the limit."""
    intervals: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    grants: dict[str, list[tuple[Call, int]]] = defaultdict(list)
    for history in histories.values():
        windows = _windows(history, books)
        for budget, window in windows.items():
            name = f"{budget}:{window}"
            intervals[name] += _certain(history, budget, terms)
            if history.granted is not None and history.granted.outcome in ("done", "prepaid"):
                grants[name].append((history.granted, history.requested[budget]))
    for name, granted in grants.items():
        limit = terms.limits[name.rpartition(":")[0]]
        covering = _Covering(intervals[name])
        for call, units in sorted(granted, key=lambda grant: grant[0].began_ns):
            if limit is None:
                continue
            excess = covering.units(call.began_ns, call.ended_ns or call.began_ns) + units - limit
            verdict.overspend = max(verdict.overspend, excess)
            if excess > terms.excess_max:
                verdict.blame(f"'{call.id}' was granted {units} units of {name}, {excess} above the limit")


def _certain(history: IdHistory, budget: str, terms: Terms) -> list[tuple[float, float, int]]:
    """Intervals during which an id certainly counts: begin, end, units."""
    found: list[tuple[float, float, int]] = []
    settled, grant = history.settled, history.granted
    # A chunk covers its drawn holds until it has committed their spend, but not a late commit.
    certain = not _is_late(history) if history.is_drawn else settled is not None and settled.outcome != "deferred"
    if settled is not None and settled.amounts.get(budget) and certain:
        found.append((settled.ended_ns or 0, FOREVER, settled.amounts[budget]))
    if grant is None or budget not in history.requested:
        return found
    until = history.settling_since()
    if grant.policy != "charge" or budget in terms.slots:
        # A replay may confirm the grant of an earlier call without a reply.
        expiry_ns = min(call.began_ns for call in history.of("reserve")) + (grant.ttl_ms - _CLOCK_NOISE_MS) * 10**6
        until = min(until, expiry_ns if terms.steady_clock else 0)
    if until > (grant.ended_ns or 0):
        found.append((grant.ended_ns or 0, until, history.requested[budget]))
    return found


def _is_late(history: IdHistory) -> bool:
    """Whether the commit may have come after a release on expiry."""
    grant, settled = history.granted, history.settled
    if grant is None or settled is None or grant.policy == "charge":
        return False
    first_ns = min(call.began_ns for call in history.of("reserve"))
    return (settled.ended_ns or 0) > first_ns + (grant.ttl_ms - _CLOCK_NOISE_MS) * 10**6


def _check_denials(
    calls: list[Call], histories: dict[str, IdHistory], books: Books, terms: Terms, verdict: Verdict
) -> None:
    """Each denial has a reason: with all units that may have counted, some budget had no room."""
    begins: dict[str, list[tuple[float, int]]] = defaultdict(list)
    ends: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for history in histories.values():
        first = min((call.began_ns for call in history.of("reserve", "record")), default=0)
        for budget, window in _windows(history, books).items():
            grown = max((call.requested.get(budget, 0) for call in history.of("grow")), default=0)
            most, name = max(history.requested.get(budget, 0), grown), f"{budget}:{window}"
            begins[name].append((first, most))
            if history.settled is not None:
                ends[name].append((history.settled.ended_ns or 0, most - history.settled.amounts.get(budget, 0)))
    for call in calls:  # perhaps granted under a generated id that no reply has shown
        if call.id is None and call.unknown:
            for name in begins:
                begins[name].append((call.began_ns, call.requested.get(name.rpartition(":")[0], 0)))
    started = {name: _Sums(points) for name, points in begins.items()}
    ended = {name: _Sums(ends[name]) for name in begins}
    for call in calls:
        if call.name != "reserve" or call.outcome != "BudgetExceeded":
            continue
        for budget, units in call.requested.items():
            room = (terms.limits[budget] or FOREVER) - units
            names = [name for name in started if name.rpartition(":")[0] == budget]
            counted = [
                started[name].before(call.ended_ns or 0) - ended[name].before(call.began_ns, including=True)
                for name in names
            ]
            if max(counted, default=0) + terms.prepaid_units > room:  # chunks may also fill a window without a hold
                break
        else:
            verdict.blame(f"'{call.id}' was denied {call.requested} although there was room")


# -- the final contents ------------------------------------------------------------------------------------------------


def _compare_with_model(histories: dict[str, IdHistory], books: Books, verdict: Verdict) -> None:
    """The calls of each id, executed by the reference model, result in the stored sums and ledgers."""
    names = set(books.sums) | {f"{s.budget}:{s.window}" for stored in books.holds.values() for s in stored.segments}
    slots = {f"{s.budget}:{s.window}" for stored in books.holds.values() for s in stored.segments if s.slots}
    model = Reference([BudgetModel(name, period="ever", slots=name in slots) for name in sorted(names)], 0)
    model.configured.append(dict.fromkeys(names))
    for hold_id in sorted(histories.keys() | books.holds.keys()):
        history, stored = histories.get(hold_id, IdHistory(hold_id)), books.holds.get(hold_id)
        if stored is None:
            _check_absent(history, verdict)
        else:
            _check_stored(model, history, stored, verdict)
    model.advance(2 * 86_400_000 - 1)
    expected: dict[str, Counter[str]] = defaultdict(Counter)
    for (name, _), window in model.windows.items():
        for _, hold_id, units, _ in window.ledger:
            expected[name][hold_id] += units
    for name in names:
        _compare(name, expected[name], books, verdict)


def _check_chunks(drawn: dict[str, IdHistory], histories: dict[str, IdHistory], books: Books, verdict: Verdict) -> None:
    """Chunks, and records of late commits, have charged exactly the spend of all drawn holds.

    A hold without an acknowledged settlement is charged at most its whole amount.
    """
    charged, least, most = Counter[str](), Counter[str](), Counter[str]()
    for name, window in books.entered.items():
        for hold_id, units in window.items():
            stored = books.holds.get(hold_id)
            if stored is not None and (stored.is_chunk or (stored.state == "recorded" and hold_id not in histories)):
                charged[name.rpartition(":")[0]] += units
    for history in drawn.values():
        settled = history.settled
        for budget, units in history.requested.items():
            grown = max((call.requested.get(budget, 0) for call in history.of("grow")), default=0)
            spent = 0 if settled is None else settled.amounts.get(budget, 0)
            least[budget] += spent
            most[budget] += max(units, grown) if settled is None else spent
    for budget in charged.keys() | least.keys():
        if not least[budget] <= charged[budget] <= most[budget]:
            verdict.lost += max(0, least[budget] - charged[budget])
            verdict.blame(
                f"{budget}: chunks have charged {charged[budget]} units; {least[budget]} to {most[budget]} were drawn"
            )


def _check_absent(history: IdHistory, verdict: Verdict) -> None:
    for call in history.calls:
        if call.acknowledged and not (history.unguarded and call.name not in ("commit", "record")):
            verdict.blame(f"'{history.id}': {call.name} was acknowledged, but the store does not have the id")
            verdict.lost += 0 if history.settled is None else sum(history.settled.amounts.values())
            return


def _check_stored(model: Reference, history: IdHistory, stored: Stored, verdict: Verdict) -> None:
    """Execute in the model the calls that the store shows as executed, and compare the outcomes."""
    names = {segment.budget: f"{segment.budget}:{segment.window}" for segment in stored.segments}
    requested = {names[segment.budget]: segment.reserved for segment in stored.segments}
    accrued = {names[s.budget]: s.accrued for s in stored.segments if s.accrued}
    charged = {names[segment.budget]: segment.charged for segment in stored.segments}
    if stored.state == "recorded":
        model.record(requested, history.id)
    else:
        model.reserve(0, requested, history.id, 86_400_000, stored.policy)
        if accrued:
            model.extend(history.id, 86_400_000, accrued)
        if stored.state == "committed":
            model.commit(history.id, charged)
        elif stored.state == "released":
            model.release(history.id)
        elif stored.state == "open":
            verdict.blame(f"'{history.id}' is still open")
    for call in history.calls:
        _check_outcome(model, call, stored, names, verdict)
    if problem := _unfounded(history, stored):
        verdict.blame(f"'{history.id}' is {stored.state}: {problem}")


def _check_outcome(model: Reference, call: Call, stored: Stored, names: dict[str, str], verdict: Verdict) -> None:
    """Compare the outcome of a settlement with the same settlement in the model, which replays it or refuses it."""
    if call.name not in ("commit", "release") or call.outcome not in (*ACKNOWLEDGED, "HoldConflict"):
        return
    if call.name == "release" and call.outcome == "deferred":
        return  # made without the store, perhaps after a commit of another replica under the same id
    try:
        if stored.state == "unconfirmed":
            raise Refused("unsettled")
        if call.name == "commit":
            amounts = model.commit(
                call.id or "", {names[name]: units for name, units in call.requested.items()}
            ).amounts
        else:
            amounts = model.release(call.id or "").amounts
        outcome = "acknowledged"
    except Refused as refused:
        outcome, amounts = refused.kind, {}
    if (outcome == "acknowledged") != call.acknowledged:
        verdict.blame(f"'{call.id}': {call.name} ended with {call.outcome}, in the model with {outcome}")
    elif call.acknowledged and amounts != {names[name]: units for name, units in call.amounts.items()}:
        verdict.blame(f"'{call.id}': {call.name} replied {call.amounts}, in the model {amounts}")


def _unfounded(history: IdHistory, stored: Stored) -> str:
    """The reason why no call explains the stored state; empty if one does."""
    charged = {segment.budget: segment.charged for segment in stored.segments}
    made = [call for call in history.calls if call.acknowledged or call.unknown]
    if stored.state in ("committed", "recorded"):
        name = "commit" if stored.state == "committed" else "record"
        if history.calls and not any(call.name == name and call.requested == charged for call in made):
            return f"no call of {name} had {charged}"
    if stored.state == "released" and not any(
        call.name == "release" or (call.name == "reserve" and call.unknown) for call in made
    ):
        return "no call released it" if history.calls else ""
    if stored.state == "unconfirmed" and history.settled is not None:
        return f"its {history.settled.name} was acknowledged"
    growth = [call.requested for call in history.of("grow") if call.acknowledged or call.unknown]
    for segment in stored.segments:
        requested = {history.requested.get(segment.budget), *(grown.get(segment.budget) for grown in growth)}
        if stored.state == "released" and not segment.reserved:
            continue  # a replay after a data loss restores a settled hold without its amount
        if history.calls and segment.reserved not in requested and stored.state in ("released", "unconfirmed"):
            return f"{segment.reserved} units of {segment.budget} were never requested"
    return ""


def _compare(name: str, expected: Counter[str], books: Books, verdict: Verdict) -> None:
    entered, sums = Counter(books.entered.get(name, {})), books.sums.get(name, Counter())
    replayed_total = entered.pop("-", 0)
    differences = {i: entered[i] - expected[i] for i in expected.keys() | entered.keys() if entered[i] != expected[i]}
    missing, surplus = expected.total() - entered.total() - replayed_total, sums["spent"] + sums["unconfirmed"]
    verdict.lost += max(0, missing)
    if surplus != expected.total():
        verdict.blame(f"{name}: {surplus} units are spent or unconfirmed, in the model {expected.total()}")
    if not replayed_total:
        for hold_id, units in sorted(differences.items())[:10]:
            verdict.blame(f"{name}: the ledger has {units:+} units of '{hold_id}' more than the model")


def _check_ledgers(books: Books, verdict: Verdict) -> None:
    """P11 and P7: ledgers add up, holds are settled, and keys expire."""
    for name, sums in books.sums.items():
        entered = sum(books.entered.get(name, {}).values())
        if sums["spent"] + sums["unconfirmed"] != entered:
            verdict.blame(f"{name}: the ledger adds up to {entered}, not to {dict(sums)}")
        if sums["held"]:
            verdict.blame(f"{name}: {sums['held']} units are held, but no hold is open")
    for key in books.immortal:
        verdict.blame(f"{key} has no expiry")
