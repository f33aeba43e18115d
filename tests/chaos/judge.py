"""Compares a complete history with the reference model, and with what the store holds in the end.

The order in which the store decided is not known from outside, but each decision lies between the begin and the end of
its call. So every grant is checked against what certainly counted while it was made, every denial against all that may
have counted, and the end against the model, which is told each id's calls; a call whose outcome nobody was told counts
as made if the store shows it. Everything is in whole units.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from ..model.reference import BudgetModel, Reference, Refused
from .history import ACKNOWLEDGED, NO_REPLY, REFUSED, Books, Call, Stored, Story, split_drawn, stories

NANOS = 10**9
FOREVER = float("inf")
_CLOCK_NOISE_MS = 100
_CLOCK_NOISE_NS = 300 * 10**6


@dataclass
class Terms:
    """What was promised to the replicas, and what a fault allows."""

    limits: Mapping[str, int | None]
    timeout_s: float
    slots: frozenset[str] = frozenset({"jobs"})
    tolerance_s: float = 0.5
    """By which a call may end late, as its caller sees it: replicas share the machine's cores."""
    lateness_max_s: float = 0.25
    """The same without what its process stood still: between the deadline and the end, while it could have ended it."""
    steady_clock: bool = True
    """Whether the store's clock went at the pace of all others: else nobody knows when holds come due."""
    midnight_ns: int | None = None
    """When the store's clock shows it, by the clock that the replicas' histories go by."""
    excess_max: int = 0
    """What may have been granted above a limit because the store had lost, meanwhile, what counted."""
    prepaid_units: int = 0
    """What the replicas may keep, at most, of each budget: the store counts it, and nobody called for it."""
    refusals: tuple[str, ...] = ()
    """Errors that this fault explains, besides that the store is away."""


@dataclass
class Verdict:
    """The figures of a run, and whatever broke a promise."""

    operations: int = 0
    grants: int = 0
    spend: int = 0
    """Nano-dollars, over all windows."""
    overspend: int = 0
    """The most by which a grant passed a limit, of what certainly counted when it was decided."""
    late: int = 0
    """What was committed after its hold had given its money back: a fact that no limit refuses (P2)."""
    lost: int = 0
    unknown: int = 0
    """Calls whose caller was not told whether they were done."""
    resolved: int = 0
    """Those that the store tells in the end, one way or the other."""
    longest_s: float = 0.0
    late_s: float = 0.0
    """The most that a process ran between the deadline and the end of a call."""
    windows: int = 0
    violations: list[str] = field(default_factory=list)

    def blame(self, text: str) -> None:
        self.violations.append(text)

    def add(self, other: Verdict) -> None:
        """Another tenant's."""
        for name in ("operations", "grants", "spend", "lost", "unknown", "resolved", "windows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.overspend = max(self.overspend, other.overspend)
        self.late = max(self.late, other.late)
        self.longest_s = max(self.longest_s, other.longest_s)
        self.late_s = max(self.late_s, other.late_s)
        self.violations += other.violations


def judge(calls: list[Call], books: Books, terms: Terms) -> Verdict:
    """Of one tenant."""
    verdict = Verdict(operations=len(calls), windows=sum(not name.endswith(":ever") for name in books.sums))
    others, drawn = split_drawn(calls, books.holds)
    told = stories(others)
    everything = told | drawn
    _each_call_ends_in_time_with_a_known_word(calls, terms, verdict)
    _nothing_is_stored_that_nobody_asked_for(calls, told, books, terms, verdict)
    _each_pays_in_its_own_window(everything, books, terms, verdict)
    _no_grant_passes_the_cap(everything, books, terms, verdict)
    _no_denial_is_unfounded(calls, everything, books, terms, verdict)
    verdict.late = sum(max(story.settled.told.values(), default=0) for story in everything.values() if _is_late(story))
    _the_end_is_what_the_model_says(told, books, verdict)
    if terms.prepaid_units:
        _chunks_commit_what_was_drawn(drawn, told, books, verdict)
    _it_adds_up(books, verdict)
    verdict.grants = sum(call.name == "reserve" and call.word in ("done", "prepaid") for call in calls)
    unknown = [call for call in calls if call.unknown]
    verdict.unknown = len(unknown)
    blamed = " ".join(verdict.violations)
    verdict.resolved = sum(call.id is None or f"'{call.id}'" not in blamed for call in unknown)
    usd = [sums["spent"] for name, sums in books.sums.items() if name.rpartition(":")[0] not in terms.slots]
    verdict.spend = sum(usd)
    return verdict


# -- calls -------------------------------------------------------------------------------------------------------------


def _each_call_ends_in_time_with_a_known_word(calls: list[Call], terms: Terms, verdict: Verdict) -> None:
    known = (*ACKNOWLEDGED, *REFUSED, *NO_REPLY[:1], "killed", "cancelled", "unguarded", "prepaid", *terms.refusals)
    for call in calls:
        verdict.longest_s = max(verdict.longest_s, call.seconds)
        late_s = call.late_s(terms.timeout_s)
        verdict.late_s = max(verdict.late_s, late_s)
        if call.seconds > terms.timeout_s + terms.tolerance_s:
            verdict.blame(f"{call.name} of '{call.id}' took {call.seconds:.2f} s")
        elif late_s > terms.lateness_max_s:
            verdict.blame(f"{call.name} of '{call.id}' ended {late_s:.2f} s late, and its process did not stand still")
        if call.word not in known:
            verdict.blame(f"{call.name} of '{call.id}' ended with {call.word}")


def _nothing_is_stored_that_nobody_asked_for(
    calls: list[Call], told: dict[str, Story], books: Books, terms: Terms, verdict: Verdict
) -> None:
    unnamed = any(call.id is None and call.unknown for call in calls)
    entered = {hold_id for window in books.entered.values() for hold_id, units in window.items() if units}
    for hold_id in sorted((books.holds.keys() | entered) - told.keys() - {"-"}):
        record = books.holds.get(hold_id)
        if terms.prepaid_units and record is not None and (record.is_chunk or record.state == "recorded"):
            continue  # a chunk, or a late commit of a hold that was drawn from one: see _chunks_commit_what_was_drawn
        # A limiter's own name, of which a caller that was killed or cancelled, or got no answer, was never told.
        if not unnamed or record is None or record.state not in ("released", "unconfirmed"):
            verdict.blame(f"'{hold_id}' is stored, but nobody asked for it")


def _each_pays_in_its_own_window(told: dict[str, Story], books: Books, terms: Terms, verdict: Verdict) -> None:
    """P8, P4: before midnight by the store's clock in the first day's, after it in the next day's."""
    if terms.midnight_ns is None:
        return
    days = sorted({window for name in books.sums if (window := name.rpartition(":")[2]) != "ever"})
    before, after = set[str](), set[str]()
    for story in told.values():
        first = min(call.began_ns for call in story.calls)
        heard = min((c.ended_ns or FOREVER for c in story.of("reserve", "record") if c.acknowledged), default=FOREVER)
        paid = {window for window in _windows(story, books).values() if window != "ever"}
        if heard < terms.midnight_ns - _CLOCK_NOISE_NS:
            before |= paid
        elif first > terms.midnight_ns + _CLOCK_NOISE_NS:
            after |= paid
    if len(days) > 2 or before & after or before - set(days[:1]) or (before and after and after != set(days[1:])):
        verdict.blame(f"before midnight these windows paid: {sorted(before)}, after it {sorted(after)}")


# -- the cap -----------------------------------------------------------------------------------------------------------


class _Sums:
    """Sums of units over what lies before an instant."""

    def __init__(self, points: Iterable[tuple[float, int]]) -> None:
        ordered = sorted(points)
        self._at = [at for at, _ in ordered]
        self._sums = [0, *accumulate(units for _, units in ordered)]

    def before(self, instant: float, *, including: bool = False) -> int:
        return self._sums[(bisect_right if including else bisect_left)(self._at, instant)]


class _Covering:
    """How many units of intervals cover another one, asked in the order of its beginning."""

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


def _windows(story: Story, books: Books) -> dict[str, str]:
    """The window of each budget of an id, as told or as stored."""
    grant = story.granted
    if grant is not None and grant.windows:
        return grant.windows
    stored = books.holds.get(story.id)
    return {} if stored is None else {segment.budget: segment.window for segment in stored.segments}


def _no_grant_passes_the_cap(told: dict[str, Story], books: Books, terms: Terms, verdict: Verdict) -> None:
    """P1: with what certainly counted while it was decided, each grant fits."""
    intervals: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    grants: dict[str, list[tuple[Call, int]]] = defaultdict(list)
    for story in told.values():
        windows = _windows(story, books)
        for budget, window in windows.items():
            name = f"{budget}:{window}"
            intervals[name] += _certain(story, budget, terms)
            if story.granted is not None and story.granted.word in ("done", "prepaid"):
                grants[name].append((story.granted, story.asked[budget]))
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


def _certain(story: Story, budget: str, terms: Terms) -> list[tuple[float, float, int]]:
    """From when until when an id certainly counts, and how much."""
    found: list[tuple[float, float, int]] = []
    settled, grant = story.settled, story.granted
    # A chunk covers what was drawn from it, until it has committed that; a late commit it does not cover.
    certain = not _is_late(story) if story.is_drawn else settled is not None and settled.word != "deferred"
    if settled is not None and settled.told.get(budget) and certain:
        found.append((settled.ended_ns or 0, FOREVER, settled.told[budget]))
    if grant is None or budget not in story.asked:
        return found
    until = story.settling_since()
    if grant.policy != "charge" or budget in terms.slots:
        # What was heard of as a replay may have been granted by an earlier call, which got no answer.
        expiry_ns = min(call.began_ns for call in story.of("reserve")) + (grant.ttl_ms - _CLOCK_NOISE_MS) * 10**6
        until = min(until, expiry_ns if terms.steady_clock else 0)
    if until > (grant.ended_ns or 0):
        found.append((grant.ended_ns or 0, until, story.asked[budget]))
    return found


def _is_late(story: Story) -> bool:
    """Whether it may have been committed after it had given money back."""
    grant, settled = story.granted, story.settled
    if grant is None or settled is None or grant.policy == "charge":
        return False
    first_ns = min(call.began_ns for call in story.of("reserve"))
    return (settled.ended_ns or 0) > first_ns + (grant.ttl_ms - _CLOCK_NOISE_MS) * 10**6


def _no_denial_is_unfounded(
    calls: list[Call], told: dict[str, Story], books: Books, terms: Terms, verdict: Verdict
) -> None:
    """With all that may have counted while it was decided, some budget had no room."""
    begins: dict[str, list[tuple[float, int]]] = defaultdict(list)
    ends: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for story in told.values():
        first = min((call.began_ns for call in story.of("reserve", "record")), default=0)
        for budget, window in _windows(story, books).items():
            grown = max((call.asked.get(budget, 0) for call in story.of("grow")), default=0)
            most, name = max(story.asked.get(budget, 0), grown), f"{budget}:{window}"
            begins[name].append((first, most))
            if story.settled is not None:
                ends[name].append((story.settled.ended_ns or 0, most - story.settled.told.get(budget, 0)))
    for call in calls:  # granted perhaps, under a name that nobody was told
        if call.id is None and call.unknown:
            for name in begins:
                begins[name].append((call.began_ns, call.asked.get(name.rpartition(":")[0], 0)))
    started = {name: _Sums(points) for name, points in begins.items()}
    ended = {name: _Sums(ends[name]) for name in begins}
    for call in calls:
        if call.name != "reserve" or call.word != "BudgetExceeded":
            continue
        for budget, units in call.asked.items():
            room = (terms.limits[budget] or FOREVER) - units
            names = [name for name in started if name.rpartition(":")[0] == budget]
            most = [
                started[name].before(call.ended_ns or 0)
                - ended[name].before(call.began_ns, including=True)
                + terms.prepaid_units
                for name in names
            ]
            if any(units > room for units in most):
                break
        else:
            verdict.blame(f"'{call.id}' was denied {call.asked} although there was room")


# -- the end -----------------------------------------------------------------------------------------------------------


def _the_end_is_what_the_model_says(told: dict[str, Story], books: Books, verdict: Verdict) -> None:
    """Each id's calls, told to the reference model, leave the sums and the ledger that the store has."""
    names = set(books.sums) | {f"{s.budget}:{s.window}" for stored in books.holds.values() for s in stored.segments}
    slots = {f"{s.budget}:{s.window}" for stored in books.holds.values() for s in stored.segments if s.slots}
    model = Reference([BudgetModel(name, period="ever", slots=name in slots) for name in sorted(names)], 0)
    model.configured.append(dict.fromkeys(names))
    for hold_id in sorted(told.keys() | books.holds.keys()):
        story, stored = told.get(hold_id, Story(hold_id)), books.holds.get(hold_id)
        if stored is None:
            _tell_absent(story, verdict)
        else:
            _tell(model, story, stored, verdict)
    model.advance(2 * 86_400_000 - 1)
    expected: dict[str, Counter[str]] = defaultdict(Counter)
    for (name, _), window in model.windows.items():
        for _, hold_id, units, _ in window.ledger:
            expected[name][hold_id] += units
    for name in names:
        _compare(name, expected[name], books, verdict)


def _chunks_commit_what_was_drawn(
    drawn: dict[str, Story], told: dict[str, Story], books: Books, verdict: Verdict
) -> None:
    """Chunks, and records of late commits, have charged the spend of all holds that were drawn, and no more.

    A hold that was left open is charged in full at the latest when its limiter is closed.
    """
    charged, least, most = Counter[str](), Counter[str](), Counter[str]()
    for name, window in books.entered.items():
        for hold_id, units in window.items():
            stored = books.holds.get(hold_id)
            if stored is not None and (stored.is_chunk or (stored.state == "recorded" and hold_id not in told)):
                charged[name.rpartition(":")[0]] += units
    for story in drawn.values():
        settled = story.settled
        for budget, units in story.asked.items():
            grown = max((call.asked.get(budget, 0) for call in story.of("grow")), default=0)
            spent = 0 if settled is None else settled.told.get(budget, 0)
            least[budget] += spent
            most[budget] += max(units, grown) if settled is None else spent
    for budget in charged.keys() | least.keys():
        if not least[budget] <= charged[budget] <= most[budget]:
            verdict.lost += max(0, least[budget] - charged[budget])
            verdict.blame(
                f"{budget}: chunks have charged {charged[budget]} units; {least[budget]} to {most[budget]} were drawn"
            )


def _tell_absent(story: Story, verdict: Verdict) -> None:
    for call in story.calls:
        if call.acknowledged and not (story.unguarded and call.name not in ("commit", "record")):
            verdict.blame(f"'{story.id}': {call.name} was acknowledged, but the store does not know the id")
            verdict.lost += 0 if story.settled is None else sum(story.settled.told.values())
            return


def _tell(model: Reference, story: Story, stored: Stored, verdict: Verdict) -> None:
    """Makes in the model what the store says has been made, and compares what callers were told."""
    names = {segment.budget: f"{segment.budget}:{segment.window}" for segment in stored.segments}
    asked = {names[segment.budget]: segment.reserved for segment in stored.segments}
    accrued = {names[s.budget]: s.accrued for s in stored.segments if s.accrued}
    charged = {names[segment.budget]: segment.charged for segment in stored.segments}
    if stored.state == "recorded":
        model.record(asked, story.id)
    else:
        model.reserve(0, asked, story.id, 86_400_000, stored.policy)
        if accrued:
            model.extend(story.id, 86_400_000, accrued)
        if stored.state == "committed":
            model.commit(story.id, charged)
        elif stored.state == "released":
            model.release(story.id)
        elif stored.state == "open":
            verdict.blame(f"'{story.id}' is still open")
    for call in story.calls:
        _check_word(model, call, stored, names, verdict)
    if problem := _unfounded(story, stored):
        verdict.blame(f"'{story.id}' is {stored.state}: {problem}")


def _check_word(model: Reference, call: Call, stored: Stored, names: dict[str, str], verdict: Verdict) -> None:
    """What a settlement was told is what the model says now that all is done: a replay, or a conflict."""
    if call.name not in ("commit", "release") or call.word not in (*ACKNOWLEDGED, "HoldConflict"):
        return
    if call.name == "release" and call.word == "deferred":
        return  # without the store: nobody could know then that another had committed under the same id
    try:
        if stored.state == "unconfirmed":
            raise Refused("unsettled")
        if call.name == "commit":
            told = model.commit(call.id or "", {names[name]: units for name, units in call.asked.items()}).amounts
        else:
            told = model.release(call.id or "").amounts
        word = "acknowledged"
    except Refused as refused:
        word, told = refused.kind, {}
    if (word == "acknowledged") != call.acknowledged:
        verdict.blame(f"'{call.id}': {call.name} was told {call.word}, by the model it is {word}")
    elif call.acknowledged and told != {names[name]: units for name, units in call.told.items()}:
        verdict.blame(f"'{call.id}': {call.name} was told {call.told}, by the model it is {told}")


def _unfounded(story: Story, stored: Stored) -> str:
    """Why a state has no reason in what was called, if it has none."""
    charged = {segment.budget: segment.charged for segment in stored.segments}
    made = [call for call in story.calls if call.acknowledged or call.unknown]
    if stored.state in ("committed", "recorded"):
        name = "commit" if stored.state == "committed" else "record"
        if story.calls and not any(call.name == name and call.asked == charged for call in made):
            return f"nobody called {name} with {charged}"
    if stored.state == "released" and not any(
        call.name == "release" or (call.name == "reserve" and call.unknown) for call in made
    ):
        return "nobody released it" if story.calls else ""
    if stored.state == "unconfirmed" and story.settled is not None:
        return f"its {story.settled.name} was acknowledged"
    growth = [call.asked for call in story.of("grow") if call.acknowledged or call.unknown]
    for segment in stored.segments:
        asked = {story.asked.get(segment.budget), *(grown.get(segment.budget) for grown in growth)}
        if stored.state == "released" and not segment.reserved:
            continue  # a hold that the store had lost and was told of again, when it was over
        if story.calls and segment.reserved not in asked and stored.state in ("released", "unconfirmed"):
            return f"{segment.reserved} units of {segment.budget} were never asked for"
    return ""


def _compare(name: str, expected: Counter[str], books: Books, verdict: Verdict) -> None:
    entered, sums = Counter(books.entered.get(name, {})), books.sums.get(name, Counter())
    told_again = entered.pop("-", 0)
    differences = {i: entered[i] - expected[i] for i in expected.keys() | entered.keys() if entered[i] != expected[i]}
    missing, surplus = expected.total() - entered.total() - told_again, sums["spent"] + sums["unconfirmed"]
    verdict.lost += max(0, missing)
    if surplus != expected.total():
        verdict.blame(f"{name}: {surplus} units are spent or unconfirmed, by the model {expected.total()}")
    if not told_again:
        for hold_id, units in sorted(differences.items())[:10]:
            verdict.blame(f"{name}: the ledger has {units:+} units of '{hold_id}' more than the model")


def _it_adds_up(books: Books, verdict: Verdict) -> None:
    """P11 and P7, read without the package."""
    for name, sums in books.sums.items():
        entered = sum(books.entered.get(name, {}).values())
        if sums["spent"] + sums["unconfirmed"] != entered:
            verdict.blame(f"{name}: the ledger adds up to {entered}, not to {dict(sums)}")
        if sums["held"]:
            verdict.blame(f"{name}: {sums['held']} units are held, but no hold is open")
    for key in books.immortal:
        verdict.blame(f"{key} will never expire")
