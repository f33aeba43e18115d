"""The arithmetic of policy `lease` without a server: random histories against a store that counts in plain integers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_budget import Budget, BudgetExceeded, HoldConflict, StoreUnavailable
from ktrdr_budget.engine.outage.policy import OfflineReservation
from ktrdr_budget.engine.outage.prepaid import PrepaidPolicy
from ktrdr_budget.engine.protocol.codes import CommitMode
from ktrdr_budget.engine.protocol.operations import CommitAmount, Labels, RecordSpend, Release
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.engine.replica.outbox import Outbox
from ktrdr_budget.engine.replica.state import ReplicaState
from ktrdr_budget.models import Denial
from ktrdr_budget.money import from_units

LIMIT, SLAB = 1_000, 100
NAMES = ("agent", "team")
SECOND = 1_000


class CountingStore:
    """Grants, grows and settles chunks in whole units, and provides the calls of leases.

    ``reach`` decides what happens to a call: ``there`` executes it, ``away`` does not, and ``reply lost`` executes it
    but drops the reply.
    """

    def __init__(self) -> None:
        self.now_ms_value = 1_000_000
        self.state = ReplicaState("default", [Budget(name, from_units(LIMIT), period="ever") for name in NAMES])
        self.state.now_ms = lambda: self.now_ms_value
        self.engine = SimpleNamespace(state=self.state)
        self.open_leases: set[Any] = set()
        self.timeout_s = 1.0
        self.reach = "there"
        self.loop = asyncio.new_event_loop()
        self.loop.time = lambda: self.now_ms_value / 1000
        self.held: dict[str, tuple[str, int]] = {}
        self.spent = dict.fromkeys(NAMES, 0)
        self.chunk_spend = dict.fromkeys(NAMES, 0)
        self.elsewhere = dict.fromkeys(NAMES, 0)
        self.settled: set[str] = set()
        self.later: list[Callable[[], None]] = []
        """Requests that are sent when the store replies again."""

    # -- the store -----------------------------------------------------------------------------------------------------

    def counted(self, name: str) -> int:
        return self.spent[name] + self.held_of(name)

    def held_of(self, name: str) -> int:
        return sum(units for budget, units in self.held.values() if budget == name)

    def grant(self, hold_id: str, name: str, units: int) -> None:
        fits = LIMIT - self.counted(name)
        if hold_id in self.settled or units > fits:
            zero, room = from_units(0), from_units(max(0, fits))
            raise BudgetExceeded(
                Denial(
                    budget=name, reason="budget_held", limit=from_units(LIMIT), spent=zero, held=zero, unconfirmed=zero,
                    remaining=room, requested=from_units(units), fits=room, retry_after=1, unit="usd",
                )
            )  # fmt: skip
        self.held[hold_id] = name, units

    def grow_hold(self, hold_id: str, total: int) -> int:
        name, units = self.held.pop(hold_id)
        try:
            self.grant(hold_id, name, max(units, total))
        except BudgetExceeded:
            self.held[hold_id] = name, units
            raise
        return max(units, total)

    def commit(self, hold_id: str, spent: int) -> None:
        """Commit a hold; a repeated commit changes nothing, nor does the commit of a hold that was never granted."""
        name, _ = self.held.pop(hold_id, ("", 0))
        self.settled.add(hold_id)
        if name:
            self.spent[name] += spent
            self.chunk_spend[name] += spent

    def spend_elsewhere(self, name: str, units: int) -> None:
        if self.counted(name) + units <= LIMIT:
            self.spent[name] += units
            self.elsewhere[name] += units

    # -- the calls of leases -------------------------------------------------------------------------------------------

    def bind(self) -> asyncio.AbstractEventLoop:
        return self.loop

    def submit(self, call: Generator[Any, Any, Any]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self.loop.create_future()
        self.loop.call_soon(self._step, call, future, None, None)
        return future

    def _step(self, call: Generator[Any, Any, Any], future: Any, reply: Any, error: Exception | None) -> None:
        try:
            request = call.throw(error) if error is not None else call.send(reply)
        except StopIteration as stop:
            future.set_result(stop.value)
            return
        except Exception as raised:
            future.set_exception(raised)
            return
        reply, error = None, None
        lost = StoreUnavailable("no reply", ambiguous=self.reach == "reply lost")
        try:
            if self.reach != "away":
                reply = request()
        except BudgetExceeded as denied:
            error = denied
        self.loop.call_soon(self._step, call, future, reply, error if self.reach == "there" else lost)

    def reserve(self, budget: str, units: int, ttl_s: float, operation: str) -> Generator[Any, Any, HoldBase]:
        hold_id = self.state.new_id()
        try:
            yield lambda: self.grant(hold_id, budget, units)
        except StoreUnavailable:
            self.later.append(lambda: self.commit(hold_id, 0))
            raise
        parts = [(self.state.current_window(budget), units)]
        return HoldBase(self.engine, hold_id, parts, 60 * SECOND, self.now_ms_value + 60 * SECOND)

    def extend(self, hold: HoldBase, accrued: int, ttl_ms: int) -> Generator[Any, Any, None]:
        yield lambda: None

    def grow(self, hold: HoldBase, total: int, ttl_ms: int) -> Generator[Any, Any, Any]:
        reserved = yield lambda: self.grow_hold(hold.id, total)
        return SimpleNamespace(segments=[SimpleNamespace(reserved=reserved)])

    def settle(self, hold: HoldBase, spent: int) -> Generator[Any, Any, None]:
        yield lambda: self.commit(hold.id, spent)

    def settle_later(self, hold: HoldBase, spent: int) -> None:
        self.later.append(lambda: self.commit(hold.id, spent))

    def record_later(self, hold: HoldBase, spent: int, operation: str) -> None:
        raise AssertionError("no chunk is released elsewhere")


class Replica:
    """Policy `lease` of one replica, and the sums of what the replica has granted and spent."""

    def __init__(self) -> None:
        self.store = CountingStore()
        self.outbox = Outbox()

        def new_hold(*args: Any, **options: Any) -> HoldBase:
            return HoldBase(self.store.engine, *args, **options)

        self.policy = PrepaidPolicy(self.store.state, self.outbox, new_hold, lambda: "")
        self.policy.prepay(self.store, dict.fromkeys(NAMES, from_units(SLAB)))
        self.policy.begin()
        self.holds: list[HoldBase] = []
        self.spent = dict.fromkeys(NAMES, 0)
        """Units settled while their grant was open."""
        self.beyond = dict.fromkeys(NAMES, 0)
        """Units spent above a grant or after its end; no chunk covers them until the store has counted them."""
        self.late = dict.fromkeys(NAMES, 0)
        """Units spent by a hold after its grant had ended."""
        self.turn()

    def turn(self, wait_ms: int = 0) -> None:
        """Run the event loop, and advance the clock."""

        async def spin() -> None:
            for _ in range(25):
                await asyncio.sleep(0)

        for part_ms in [SECOND] * (wait_ms // SECOND) if wait_ms < 90 * SECOND else [wait_ms]:
            self.store.now_ms_value += part_ms
            self.store.loop.run_until_complete(spin())
        self.store.loop.run_until_complete(spin())

    def reach(self, reach: str) -> None:
        self.store.reach = reach
        if reach == "there":
            self.policy.store_replies()
            later, self.store.later = self.store.later, []
            for request in later:
                request()
            for entry in list(self.outbox):
                if isinstance(entry.request, RecordSpend):
                    for window, units in entry.request.parts:
                        self.store.spent[window.budget] += units
                self.outbox.end(entry, "executed")

    def draw(self, amounts: dict[str, int], on_expiry: str = "c", ttl_s: int = 60, **given: Any) -> HoldBase | None:
        parts = [(self.store.state.current_window(name), units) for name, units in amounts.items()]
        wanted = OfflineReservation(
            given.get("id") or self.store.state.new_id(), parts, ttl_s * SECOND, on_expiry,
            given.get("labels", Labels()),
            given.get("request", ""), given.get("ambiguous", False),
        )  # fmt: skip
        hold = self.policy.reserve(wanted)
        if hold is not None:
            self.holds.append(hold)
        return hold

    def settle(self, hold: HoldBase, shares: int, above: int = 0) -> None:
        """Commit a percentage of the grants, plus ``above`` units; release if both are 0."""
        open_grants = [not grant.settled for grant in hold.offline.grants]
        granted = [grant.units for grant in hold.offline.grants]
        units = [reserved * shares // 100 + above for _, reserved in hold.parts]
        amounts = [CommitAmount(CommitMode.EXACT, each) for each in units] if shares or above else None
        hold.offline.settle(hold, amounts, "")
        self.holds.remove(hold)
        figures = zip(hold.parts, units, granted, open_grants, strict=True)
        for (window, _), amount, grant, is_open in figures if amounts else ():
            self.spent[window.budget] += amount if is_open else 0
            self.beyond[window.budget] += max(0, amount - grant) if is_open else amount
            self.late[window.budget] += 0 if is_open else amount

    def granted(self, name: str) -> int:
        return sum(
            grant.units
            for hold in self.holds
            for grant, (window, _) in zip(hold.offline.grants, hold.parts, strict=True)
            if window.budget == name and not grant.settled
        )

    def check(self) -> None:
        """The store counts at least what was granted and spent here, and never more than the limit."""
        for name in NAMES:
            covered = self.store.held_of(name) + self.store.chunk_spend[name]
            assert covered + self.beyond[name] >= self.granted(name) + self.spent[name]
            assert self.store.counted(name) <= LIMIT + self.beyond[name]

    def close(self) -> None:
        for lease in list(self.store.open_leases):
            self.store.loop.run_until_complete(lease.closed(all_grants=True))
        self.store.loop.close()


@pytest.fixture
def replica() -> Iterator[Replica]:
    made = Replica()
    yield made
    if not made.store.loop.is_closed():
        made.store.loop.close()


at = st.integers(0, 30)
steps = st.one_of(
    st.tuples(st.just("reach"), st.sampled_from(["there", "there", "away", "reply lost"])),
    st.tuples(
        st.just("draw"), st.integers(1, 60), st.sampled_from(["both", *NAMES]), st.sampled_from("car"),
        st.sampled_from([1, 5, 60]),
    ),
    st.tuples(st.just("settle"), at, st.integers(0, 100)),
    st.tuples(st.just("settle above"), at, st.integers(1, 60)),
    st.tuples(st.just("accrue"), at, st.integers(1, 30)),
    st.tuples(st.just("extend"), at, st.integers(0, 40), st.sampled_from([None, 1, 60])),
    st.tuples(st.just("give up"), at),
    st.tuples(st.just("wait"), st.sampled_from([0, 1, 2, 25])),
    st.tuples(st.just("wait"), st.just(21 * 3600)),
    st.tuples(st.just("elsewhere"), st.sampled_from(NAMES), st.integers(1, 400)),
)  # fmt: skip


def act(replica: Replica, step: tuple[Any, ...]) -> None:
    match step:
        case ("reach", reach):
            replica.reach(reach)
        case ("draw", units, which, on_expiry, ttl_s):
            replica.draw(dict.fromkeys(NAMES if which == "both" else (which,), units), on_expiry, ttl_s)
        case ("wait", seconds):
            replica.turn(seconds * SECOND)
        case ("elsewhere", name, units):
            replica.store.spend_elsewhere(name, units)
        case (action, number, *figures) if replica.holds:
            hold = replica.holds[number % len(replica.holds)]
            if action == "settle":
                replica.settle(hold, figures[0])
            elif action == "settle above":
                replica.settle(hold, 100, figures[0])
            elif action == "accrue":
                hold.adjust(dict.fromkeys(NAMES, figures[0]))
            elif action == "give up":
                replica.policy.give_up(hold)
                replica.holds.remove(hold)
            else:
                more, ttl_s = figures
                parts = [(window, units + more) for window, units in hold.parts]
                with suppress(StoreUnavailable):
                    hold.offline.extend(hold, lambda: parts, None if ttl_s is None else ttl_s * SECOND)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(st.lists(steps, max_size=60))
def test_policy_lease_never_exceeds_the_cap_and_loses_no_spend_in_random_histories(history):
    replica = Replica()
    for step in history:
        act(replica, step)
        replica.check()
        replica.turn()
        replica.check()
    replica.reach("there")
    replica.turn(2 * SECOND)
    replica.check()
    left_open = {name: replica.granted(name) for name in NAMES}
    replica.close()
    for name in NAMES:
        assert replica.store.held_of(name) == 0
        assert replica.store.chunk_spend[name] == replica.spent[name] + left_open[name]
        others = replica.store.chunk_spend[name] + replica.store.elsewhere[name]
        assert replica.store.spent[name] == others + replica.late[name]


def settle(hold: HoldBase, units: int | None) -> Any:
    amounts = None if units is None else [CommitAmount(CommitMode.EXACT, units) for _ in hold.parts]
    return hold.offline.settle(hold, amounts, "")


def test_policy_lease_grants_and_records_nothing_before_the_store_grants_the_first_chunk():
    replica = Replica.__new__(Replica)
    store, outbox = CountingStore(), Outbox()
    store.reach = "away"
    replica.policy = PrepaidPolicy(store.state, outbox, lambda *_, **__: pytest.fail("granted"), lambda: "")
    replica.policy.prepay(store, {"agent": from_units(SLAB)})
    replica.policy.begin()
    window = store.state.current_window("agent")
    for units in (0, 1):
        assert replica.policy.record(RecordSpend("r", "k", [(window, units)]), ambiguous=False) is None
    store.loop.close()


def test_a_reservation_refused_in_an_outage_does_not_enlarge_the_next_chunk(replica):
    """The store is reachable again when the lease asks for its next chunk."""
    replica.reach("away")
    assert replica.draw({"agent": SLAB + 50}) is None
    replica.reach("there")
    replica.turn(2 * SECOND)
    assert replica.policy.remaining == {name: from_units(SLAB) for name in NAMES}
    assert replica.store.held_of("agent") == SLAB


def test_a_release_is_queued_if_a_request_granted_from_a_lease_may_have_reached_the_store(replica):
    hold = replica.draw({"agent": 10}, id="op_1", request="request_1", ambiguous=True)
    assert hold is not None
    [entry] = replica.outbox
    assert isinstance(entry.request, Release)
    assert (entry.kind, entry.request.request) == ("release", "request_1")


def test_a_late_commit_is_recorded_with_a_new_id_if_the_hold_returned_its_money_at_expiry(replica):
    replica.reach("away")
    hold = replica.draw({"agent": 10}, "r", ttl_s=1, id="op_1", labels=Labels(scope="user=alice;usd"))
    assert hold is not None
    replica.turn(2 * SECOND)
    assert hold.state == "unconfirmed"
    assert settle(hold, 7).late
    [entry] = replica.outbox
    assert isinstance(entry.request, RecordSpend)
    assert entry.hold_id != "op_1"
    assert list(entry.request.units) == [7]
    assert entry.request.scope == "user=alice"


def test_spend_paid_from_a_lease_is_recorded_once_for_each_id_and_digest(replica):
    replica.reach("away")
    window = replica.store.state.current_window("agent")

    def record(units: int, digest: str) -> Any:
        return replica.policy.record(RecordSpend("r", "k", [(window, units)], digest=digest), ambiguous=False)

    assert not record(5, "one").replayed
    assert record(5, "one").replayed
    assert record(5, "").replayed
    for units, digest in ((5, "two"), (6, "")):
        with pytest.raises(HoldConflict, match="is recorded"):
            record(units, digest)
    assert replica.policy.remaining["agent"] == from_units(SLAB - 5)


@pytest.mark.parametrize(("first", "second"), [(5, 6), (5, None), (None, 5)])
def test_a_settled_offline_hold_refuses_a_different_settlement(replica, first, second):
    hold = replica.draw({"agent": 10, "team": 20})
    assert hold is not None
    assert not settle(hold, first).replayed
    assert settle(hold, first).replayed
    with pytest.raises(HoldConflict) as conflict:
        settle(hold, second)
    assert conflict.value.state == ("released" if first is None else "committed")
    with pytest.raises(HoldConflict):
        hold.offline.extend(hold, lambda: hold.parts, SECOND)


def test_growth_is_refused_in_all_budgets_if_one_budget_has_too_little_left(replica):
    hold = replica.draw({"agent": 60, "team": 10})
    assert hold is not None
    with pytest.raises(StoreUnavailable):
        hold.offline.extend(hold, lambda: [(window, units + 50) for window, units in hold.parts], None)
    assert [grant.units for grant in hold.offline.grants] == [60, 10]
    assert replica.policy.remaining == {"agent": from_units(40), "team": from_units(90)}


def test_a_forked_child_cannot_settle_offline_holds_of_its_parent(replica):
    hold = replica.draw({"agent": 10})
    assert hold is not None
    replica.store.state.renew()
    replica.policy.clear()
    with pytest.raises(HoldConflict):
        settle(hold, 5)
    with pytest.raises(HoldConflict):
        hold.offline.extend(hold, lambda: hold.parts, SECOND)
