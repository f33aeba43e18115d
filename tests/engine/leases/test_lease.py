"""A lease: when it requests a chunk, how long a chunk can be used, and how the spend of a chunk is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from ktrdr_budget import (
    Budget,
    BudgetExceeded,
    HoldConflict,
    InvalidAmount,
    InvalidArgument,
    StoreError,
    StoreUnavailable,
    UnknownBudget,
    UnknownHold,
)
from ktrdr_budget.engine.leases.lease import LeaseBase
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.models import Denial

from ...helpers.calls import NO_REPLY, NOT_SENT, NOW_MS, call_context

BUDGETS = [Budget("tokens", 1000, unit="tokens"), Budget("jobs", 1, kind="slots")]
SLAB = 100
TTL_S = 60


class Store:
    """Provides the calls of leases on an event loop whose clock the test sets; ``left`` tokens can be reserved.

    Each request ends at once; it fails if :attr:`errors` has an error under the name of the request.
    """

    def __init__(self) -> None:
        self.state = call_context(*BUDGETS).state
        self.open_leases: set[LeaseBase] = set()
        self.timeout_s = 1.0
        self.left = 1000
        self.errors: dict[str, Exception] = {}
        self.is_silent = self.is_closed = False
        """``is_silent``: requests receive no reply. ``is_closed``: the limiter is closed."""
        self.requests: list[tuple[Any, ...]] = []
        self.now_s = 0.0
        self.loop = asyncio.new_event_loop()
        self.loop.time = lambda: self.now_s

    def turn(self, seconds: int = 0) -> list[tuple[Any, ...]]:
        """Advance the clock; return the requests that were sent."""
        self.requests.clear()

        async def spin() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        for _ in range(max(1, seconds)):
            self.now_s += min(seconds, 1)
            self.loop.run_until_complete(spin())
        return self.requests

    def _request(self, name: str, *figures: Any) -> None:
        self.requests.append((name, *figures))
        if name in self.errors:
            raise self.errors[name]

    def _take(self, units: int) -> None:
        if units > self.left:
            reason = "budget_held"
            raise BudgetExceeded(Denial("tokens", reason, 1000, 0, 1000 - self.left, 0, self.left, units, self.left, 1))
        self.left -= units

    # -- the calls -----------------------------------------------------------------------------------------------------

    def bind(self) -> asyncio.AbstractEventLoop:
        return self.loop

    def submit(self, call: Generator[Any, Any, Any]) -> asyncio.Future[Any]:
        if self.is_closed:
            raise RuntimeError("this limiter is closed")
        future = self.loop.create_future()
        try:
            if not self.is_silent:
                next(call)
        except StopIteration as end:
            future.set_result(end.value)
        except Exception as error:
            future.set_exception(error)
        return future

    def reserve(self, budget, units, ttl_s, operation):
        self._request("reserve", units)
        self._take(units)
        parts = [(self.state.current_window(budget), units)]
        engine = SimpleNamespace(state=self.state)
        return HoldBase(engine, "chunk", parts, TTL_S * 1000, NOW_MS + TTL_S * 1000)
        yield

    def extend(self, hold, accrued, ttl_ms):
        self._request("extend", accrued)
        yield from ()

    def grow(self, hold, total, ttl_ms):
        self._request("grow", total)
        self._take(total - hold.reserved_units["tokens"])
        return SimpleNamespace(segments=[SimpleNamespace(reserved=total)])
        yield

    def settle(self, hold, spent):
        self._request("settle", spent)
        yield from ()

    def settle_later(self, hold, spent):
        self._request("settle later", spent)

    def record_later(self, hold, spent, operation):
        self._request("record later", spent)


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.loop.close()


def opened(store: Store, **options: Any) -> LeaseBase:
    """A lease with one chunk; it releases no idle chunk unless a test says so."""
    lease = LeaseBase(store, "tokens", SLAB, **({"ttl": TTL_S, "idle": None} | options))
    store.loop.run_until_complete(lease.opened())
    return lease


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"budget": "tokns"}, UnknownBudget),
        ({"budget": "jobs"}, InvalidArgument),
        ({"slab": 0}, InvalidAmount),
        ({"low_water": 101}, InvalidArgument),
        ({"idle": 0}, InvalidArgument),
        ({"idle": True}, InvalidArgument),
        ({"ttl": 0}, InvalidArgument),
    ],
)
def test_a_lease_with_an_invalid_option_is_refused(store, options, error):
    with pytest.raises(error):
        LeaseBase(store, **({"budget": "tokens", "slab": SLAB} | options))


def test_a_lease_reserves_one_chunk_and_spends_from_the_chunk_without_requests_to_the_store(store):
    lease = opened(store)
    assert store.requests == [("reserve", SLAB)]
    lease.spend(30)
    lease.reserve(10).commit(5)
    assert store.turn() == []
    assert (lease.spent, lease.remaining) == (35, 65)
    assert repr(lease) == "<LeaseBase tokens 65 tokens left>"


def test_a_lease_cannot_be_opened_twice(store):
    lease = opened(store)
    with pytest.raises(RuntimeError, match="opened only once"):
        store.loop.run_until_complete(lease.opened())
    assert store.requests == [("reserve", SLAB)]


@pytest.mark.parametrize("error", [StoreError("NOAUTH"), InvalidArgument("other definition")])
def test_a_lease_does_not_open_if_the_store_refuses_the_first_chunk(store, error):
    store.errors["reserve"] = error
    with pytest.raises(type(error)):
        opened(store)
    store.turn(1)
    assert not store.open_leases


@pytest.mark.parametrize("error", [None, NOT_SENT], ids=["no room", "no reply"])
def test_a_lease_opens_without_a_chunk_if_the_store_has_no_room_or_does_not_reply(store, error):
    store.left = 0
    store.errors = {"reserve": error} if error else {}
    lease = opened(store)
    with pytest.raises(StoreUnavailable if error else BudgetExceeded):
        lease.spend(1)


# -- the next chunk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "spent"), [({}, 50), ({"low_water": 10}, 90), ({"low_water": 0}, 100)])
def test_the_next_chunk_is_requested_when_less_than_low_water_is_left(store, options, spent):
    lease = opened(store, **options)
    lease.spend(spent)
    assert store.turn() == []
    if spent < SLAB:
        lease.spend(1)
        assert store.turn() == [("reserve", SLAB)]


def test_a_lease_requests_a_new_chunk_each_time_its_current_chunk_runs_low(store):
    lease = opened(store)
    for _ in range(3):
        lease.spend(60)
        lease.spend(40)
        assert ("reserve", SLAB) in store.turn()
    assert (lease.spent, lease.remaining) == (300, SLAB)


def test_the_next_chunk_has_the_whole_refused_amount_if_the_amount_is_larger_than_a_chunk(store):
    lease = opened(store)
    with pytest.raises(BudgetExceeded):
        lease.spend(250)
    assert store.turn() == [("reserve", 250)]
    lease.spend(250)


@pytest.mark.parametrize(("needed", "grows"), [(130, True), (131, False)])
def test_a_chunk_grows_by_the_last_units_of_a_budget_only_if_it_then_covers_the_refused_amount(store, needed, grows):
    lease = opened(store, low_water=0)
    store.left = 30
    with pytest.raises(BudgetExceeded):
        lease.spend(needed)
    assert store.turn() == [("reserve", needed)] + [("grow", 130)] * grows
    assert lease.remaining == (130 if grows else 100)


def test_the_spend_of_a_chunk_is_committed_even_if_growth_fails_because_the_chunk_is_settled(store):
    lease = opened(store, low_water=0)
    lease.spend(7)
    store.left, store.errors["grow"] = 30, HoldConflict("released", state="released")
    with pytest.raises(BudgetExceeded):
        lease.spend(120)
    assert ("settle", 7) in store.turn()


@pytest.mark.parametrize(
    ("error", "logged"), [(InvalidArgument("other definition"), True), (NOT_SENT, False), (None, False)]
)
def test_a_failed_request_for_a_chunk_is_logged_unless_the_cause_is_an_outage_or_a_denial(store, caplog, error, logged):
    lease = opened(store)
    store.left, store.errors = 0, {"reserve": error} if error else {}
    lease.spend(51)
    store.turn()
    assert (caplog.messages == [f"no chunk for the lease of tokens: {error}"]) is logged


def test_a_lease_reserves_the_rest_of_a_budget_if_less_than_a_chunk_is_left(store):
    store.left = 30
    assert opened(store).remaining == 30
    assert store.requests == [("reserve", SLAB), ("reserve", 30)]


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_callers_that_wait_for_room_are_served_in_order(store):
    lease = opened(store)
    lease.spend(100)
    first, second = Future[Any](), Future[Any]()
    lease.wait(80, first)
    lease.wait(10, second)
    assert not second.done(), "it would fit, but came later"
    store.turn()
    assert (first.result(0).amount, second.result(0).amount) == (80, 10)


def test_a_waiting_caller_is_denied_after_the_store_refuses_a_chunk_requested_for_the_caller(store):
    lease = opened(store)
    store.left = 0
    future = Future[Any]()
    lease.wait(SLAB + 1, future)
    store.turn()
    assert isinstance(future.exception(0), BudgetExceeded)


def test_a_caller_that_came_after_a_request_was_sent_waits_for_the_reply_to_the_next_request(store):
    lease = opened(store)
    store.left = 0
    first, second = Future[Any](), Future[Any]()
    lease.wait(SLAB + 1, first)
    lease.wait(SLAB + 1, second)
    assert store.turn() == [("reserve", SLAB + 1)], "another request, for the second"
    assert isinstance(second.exception(0), BudgetExceeded)


def test_each_waiting_caller_fails_after_its_own_timeout_if_the_store_does_not_reply(store):
    lease = opened(store)
    store.is_silent = True
    first, second = Future[Any](), Future[Any]()
    lease.wait(SLAB + 1, first)
    store.now_s += 0.5
    lease.wait(SLAB + 1, second)
    store.turn()
    assert not first.done()
    store.now_s += 0.5
    store.turn()
    assert "no reply in 1 s" in str(first.exception(0))
    assert not second.done()


def test_the_grant_of_a_cancelled_waiting_caller_returns_to_the_lease(store):
    lease = opened(store)
    lease.spend(100)
    cancelled = Future[Any]()
    lease.wait(80, cancelled)
    cancelled.cancel()
    store.turn()
    gone = Future[Any]()
    gone.set_result("the future does not accept the grant")
    lease.wait(80, gone)
    store.turn()
    assert (lease.held, lease.remaining) == (0, SLAB)


# -- the life of a chunk -----------------------------------------------------------------------------------------------


def test_a_heartbeat_reports_the_spend_of_a_chunk_at_each_third_of_the_ttl(store):
    lease = opened(store)
    lease.spend(7)
    assert store.turn(TTL_S // 3 - 1) == []
    assert store.turn(2) == [("extend", 7)]


@pytest.mark.parametrize(("spent", "open_grant", "released"), [(0, False, True), (7, False, True), (0, True, False)])
def test_an_idle_chunk_is_settled_with_its_spend_unless_a_grant_is_open(store, spent, open_grant, released):
    lease = opened(store, idle=5)
    lease.spend(spent)
    grant = lease.reserve(1) if open_grant else None
    assert store.turn(7) == [("settle", spent)] * released
    assert grant is None or not grant.settled


def test_all_idle_chunks_of_a_lease_are_settled(store):
    lease = opened(store, idle=5)
    lease.spend(51)
    assert store.turn() == [("reserve", SLAB)]
    assert sorted(store.turn(8)) == [("settle", 0), ("settle", 51)]


@pytest.mark.parametrize("error", [HoldConflict("released", state="released"), UnknownHold("lost")])
def test_a_chunk_grants_nothing_after_a_different_client_has_settled_the_chunk(store, caplog, error):
    lease = opened(store)
    lease.spend(7)
    store.errors["extend"] = error
    store.turn(TTL_S // 3 + 1)
    assert lease.remaining == 0
    assert ("settle", 7) in store.requests, "its spend is a fact"
    assert "chunk chunk of the lease of tokens lost" in caplog.text


def test_a_chunk_stays_usable_if_a_heartbeat_gets_no_reply(store, caplog):
    lease = opened(store)
    store.errors["extend"] = NO_REPLY
    store.turn(TTL_S // 3 + 1)
    assert lease.remaining == SLAB
    assert "heartbeat of the lease of tokens failed" in caplog.text


def test_a_chunk_is_settled_after_the_end_of_its_window_even_if_the_lease_is_not_used(store):
    lease = opened(store)
    lease.spend(7)
    store.state.set_clock(lease.chunk.hold.parts[0][0].span.end_ms * 1000, 0)
    assert ("settle", 7) in store.turn(2)


def test_an_overrun_of_a_chunk_is_committed_at_once(store):
    """Until the commit, other replicas can spend the units of the overrun, because the store does not count them."""
    lease = opened(store)
    lease.reserve(100).commit(130)
    assert ("settle", 130) in store.turn()


# -- settlement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spent", "error", "further"),
    [
        (7, None, []),
        (7, NO_REPLY, [("settle later", 7)]),
        (7, HoldConflict("released", state="released"), [("record later", 7)]),
        (0, HoldConflict("released", state="released"), []),
        (7, HoldConflict("committed", state="committed"), []),
        (0, UnknownHold("lost"), []),
    ],
    ids=["committed", "no reply", "released elsewhere", "released elsewhere, no spend", "committed elsewhere", "lost"],
)
def test_settling_a_chunk_loses_no_spend_with_any_reply_of_the_store(store, spent, error, further):
    lease = opened(store)
    lease.spend(spent)
    store.errors = {"settle": error} if error else {}
    store.requests.clear()
    store.loop.run_until_complete(lease.closed())
    assert store.requests == [("settle", spent), *further]
    assert lease.retired == []


def test_the_commit_of_a_chunk_is_repeated_if_the_store_refuses_the_commit(store, caplog):
    lease = opened(store)
    lease.spend(7)
    store.errors["settle"] = StoreError("OOM")
    store.loop.run_until_complete(lease.closed())
    assert caplog.messages == ["lease of tokens: commit of a chunk postponed: OOM"]
    store.errors.clear()
    assert store.turn(1) == [("settle", 7)]
    assert lease.retired == []


def test_a_closed_lease_grants_nothing_and_settles_its_chunk_after_the_last_open_grant(store):
    lease = opened(store)
    grant = lease.reserve(40)
    lease.shut()
    assert store.turn() == []
    with pytest.raises(RuntimeError, match="closed"):
        lease.spend(1)
    grant.commit(30)
    assert store.turn() == [("settle", 30)]
    store.turn(1)
    assert not store.open_leases


def test_closing_the_limiter_charges_open_grants_in_full(store):
    lease = opened(store)
    grant = lease.reserve(40)
    store.loop.run_until_complete(lease.closed(all_grants=True))
    assert store.requests[-1] == ("settle", 40)
    with pytest.raises(HoldConflict, match="charged in full"):
        grant.commit(30)


def test_closing_a_lease_logs_an_error_if_the_limiter_is_already_closed(store, caplog):
    lease = opened(store)
    lease.spend(7)
    store.is_closed = True
    store.loop.run_until_complete(lease.closed())
    assert caplog.messages == ["lease of tokens: commit of a chunk failed: this limiter is closed"]


def test_a_forked_child_can_neither_spend_nor_settle_a_chunk_of_its_parent(store):
    lease = opened(store)
    lease.after_fork()
    assert not lease.belongs_here
    with pytest.raises(RuntimeError, match="open another in the child"):
        lease.spend(1)
    store.loop.run_until_complete(lease.closed())
    assert ("settle", 0) not in store.turn(), "the parent settles it"
