"""The replay of the outbox: what is queued, in which order it is sent, and what ends an entry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ktrdr_budget import Budget, StoreError, StoreUnavailable
from ktrdr_budget.engine.batching.replay import Replayer
from ktrdr_budget.engine.outage.policy import release_unreceived
from ktrdr_budget.engine.protocol.codes import COMMITTED, CommitMode, ExtendMode
from ktrdr_budget.engine.protocol.operations import (
    Commit,
    CommitAmount,
    Extend,
    ExtendAmount,
    Labels,
    Operation,
    RecordSpend,
    Release,
    Reserve,
)
from ktrdr_budget.engine.protocol.replies import (
    Conflict,
    Extended,
    MissingWindow,
    Recovering,
    Settled,
    UnknownHoldReply,
    Unreadable,
    WindowFull,
)
from ktrdr_budget.engine.protocol.requests import Command, PreparedFact, Read
from ktrdr_budget.engine.replica.journal import AGE_MAX_MS
from ktrdr_budget.engine.replica.outbox import Entry
from ktrdr_budget.engine.transport.errors import Transient

from ...helpers.background import LOST, ScriptedBackground
from ...helpers.calls import NOT_SENT, NOW_MS, NOW_US, call_context, errors_of, found, granted_hold, hold_record

CONTEXT = call_context(Budget("tokens", 1000, unit="tokens"))
WINDOW = CONTEXT.state.current_window("tokens")


def commit(hold_id: str = "a", units: int = 7) -> Commit:
    return Commit(hold_id, CONTEXT.state.keys.hold(hold_id), [WINDOW], [CommitAmount(CommitMode.EXACT, units)])


def reservation(request: str = "", hold_id: str = "a") -> Reserve:
    parts = [(WINDOW, 40)]
    terms = {"ttl_ms": 1000, "policy": "c", "labels": Labels(), "now_ms": NOW_MS, "request": request}
    return Reserve(hold_id, CONTEXT.state.keys.hold(hold_id), parts, **terms)


def heartbeat(accrued: int) -> Extend:
    return Extend("a", CONTEXT.state.keys.hold("a"), [WINDOW], [ExtendAmount(accrued)], 1000, ExtendMode.HEARTBEAT)


def by_id(hold_id: str = "a") -> PreparedFact:
    return PreparedFact(hold_id, CONTEXT.state.keys.hold(hold_id), "'7'", lambda record: commit(hold_id))


def release(hold_id: str = "a") -> Release:
    return release_unreceived(hold_id, CONTEXT.state.keys.hold(hold_id), [WINDOW], "")


RECORD = RecordSpend("a", CONTEXT.state.keys.hold("a"), [(WINDOW, 7)])


class Replica:
    """A replayer whose requests receive these replies."""

    def __init__(self, *replies: Any) -> None:
        self.context = call_context(Budget("tokens", 1000, unit="tokens"))
        self.outbox = self.context.outbox
        self.background = ScriptedBackground(self.context.state, *replies)
        self.breaker = SimpleNamespace(open=False)
        self.repair = SimpleNamespace(active=False, begin=lambda: setattr(self.repair, "active", True))
        self.settled: list[str] = []
        self.replayer = Replayer(
            self.context,
            self.background,
            self.breaker,
            self.repair,
            lambda op, settled: self.settled.append(op.hold_id),
        )

    def add(self, request: Operation | PreparedFact, kind: Any, maybe_executed_us: int | None = NOW_US) -> Replica:
        self.outbox.add(Entry(request, kind, maybe_executed_us))
        return self

    async def drain(self) -> Replica:
        self.background.bind(asyncio.get_running_loop())
        await self.replayer.drain()
        return self

    @property
    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.outbox]

    @property
    def outcomes(self) -> dict[str, int]:
        return {outcome: count for outcome, count in self.outbox.outcomes.items() if count}


# -- what is queued ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "kinds"),
    [(commit(), ["settlement"]), (RECORD, ["settlement"]), (reservation(), ["look up"]), (heartbeat(7), [])],
)
def test_settlements_and_reservations_are_queued_after_a_lost_reply_but_heartbeats_are_not(request_, kinds):
    """A heartbeat is not queued, because the next heartbeat sends the same totals or larger ones."""
    replica = Replica()
    replica.replayer.resolve_later(request_)
    assert replica.kinds == kinds


@pytest.mark.parametrize(
    ("request_", "executed", "kinds"),
    [
        (commit(), False, ["settlement"]),
        (heartbeat(7), False, ["report"]),
        (heartbeat(0), False, []),
        (reservation(), True, ["release"]),
        (reservation(), False, []),
        (Read("script", [], [], prepares=by_id()), False, ["by id"]),
        (Read("script", [], []), False, []),
        (Command(None, [], []), True, []),
    ],
)
def test_reports_of_spend_and_releases_of_possible_grants_are_queued_if_the_caller_is_gone(request_, executed, kinds):
    replica = Replica()
    replica.replayer.take_over(request_, maybe_executed=executed)
    assert replica.kinds == kinds


def test_a_queued_heartbeat_only_reports_spend_and_a_queued_record_is_marked_as_late():
    replica = Replica()
    replica.replayer.take_over(heartbeat(7), maybe_executed=True)
    replica.replayer.take_over(RECORD, maybe_executed=True)
    report, record = (entry.request for entry in replica.outbox)
    assert isinstance(report, Extend)
    assert (report.mode, report.amounts) == (ExtendMode.REPORT, [ExtendAmount(7)])
    assert isinstance(record, RecordSpend)
    assert record.is_late


# -- the order ---------------------------------------------------------------------------------------------------------


async def test_a_replay_first_reads_the_holds_of_settlements_by_id_and_finally_looks_up_reservations():
    record = hold_record(CONTEXT, tokens=40).render()
    replica = Replica(found([record]), [Settled((7,)), Settled((0,))], found([None]))
    replica.add(reservation("r1", "c"), "look up").add(by_id("b"), "by id").add(release(), "release")
    await replica.drain()
    reads_and_batches = [sent if isinstance(sent, list) else type(sent) for sent in replica.background.sent]
    assert [sent if sent is Read else {op.hold_id for op in sent} for sent in reads_and_batches] == [
        Read,
        {"a", "b"},
        Read,
    ]
    assert len(replica.outbox) == 0


# -- what ends an entry ------------------------------------------------------------------------------------------------

CONFLICT = Conflict(hold_record(CONTEXT, COMMITTED, tokens=40).render())
REPORTED = Extended(hold_record(CONTEXT, tokens=40).render())


@pytest.mark.parametrize(
    ("request_", "kind", "reply", "outcome"),
    [
        (commit(), "settlement", Settled((7,)), "sent_again"),
        (commit(), "settlement", Settled((7,), replayed=True), "executed"),
        (commit(), "settlement", CONFLICT, "superseded"),
        (commit(), "settlement", UnknownHoldReply(), "absent"),
        (commit(), "settlement", WindowFull("tokens:now"), "refused"),
        (heartbeat(7).as_report(), "report", REPORTED, "sent_again"),
        (release(), "release", Settled((0,)), "released"),
        (release(), "release", CONFLICT, "superseded"),
    ],
)
async def test_each_reply_to_a_queued_request_is_counted_as_the_right_outcome(request_, kind, reply, outcome):
    assert (await Replica([reply]).add(request_, kind).drain()).outcomes == {outcome: 1}


@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        (None, "absent"),
        (hold_record(CONTEXT, tokens=40)._replace(request="r1"), "granted"),
        (hold_record(CONTEXT, tokens=40)._replace(request="r2"), "superseded"),
        (hold_record(CONTEXT, COMMITTED, tokens=40)._replace(request="r1"), "superseded"),
    ],
    ids=["never granted", "granted to this request", "granted to another", "settled"],
)
async def test_looking_up_a_reservation_counts_its_outcome_and_changes_nothing_in_the_store(record, outcome):
    replica = Replica(found([record and record.render()])).add(reservation("r1"), "look up")
    assert (await replica.drain()).outcomes == {outcome: 1}
    assert len(replica.background.sent) == 1, "nothing is changed"


@pytest.mark.parametrize("reply", [Recovering(NOW_MS), MissingWindow("tokens:now"), Unreadable("WRONGTYPE")])
async def test_an_operation_that_was_not_executed_stays_queued(reply):
    assert (await Replica([reply]).add(commit(), "settlement").drain()).kinds == ["settlement"]


@pytest.mark.parametrize("is_found", [False, True])
async def test_requests_for_a_missing_hold_stay_queued_while_other_replicas_replay_lost_data(is_found):
    record = hold_record(CONTEXT, tokens=40).render() if is_found else None
    recovering = found([record], recovering_until_ms=NOW_MS + 1)
    replica = Replica(recovering, *[[Settled((7,))]] * is_found, recovering)
    await replica.add(by_id(), "by id").add(reservation("r1", "b"), "look up").drain()
    assert replica.kinds == ([] if is_found else ["by id", "look up"])


async def test_a_large_outbox_is_sent_in_several_batches():
    replica = Replica([Settled((7,))] * 128, [Settled((7,))])
    for number in range(129):
        replica.add(commit(f"hold-{number}"), "deferred")
    await replica.drain()
    assert [len(batch) for batch in replica.background.sent if isinstance(batch, list)] == [128, 1]
    assert len(replica.outbox) == 0


@pytest.mark.parametrize(("age_ms", "sent"), [(AGE_MAX_MS + 60_000, 0), (AGE_MAX_MS - 60_000, 1)])
async def test_a_request_that_may_have_been_executed_long_ago_is_dropped_with_an_error(caplog, age_ms, sent):
    """The store may have dropped the id, and would then count the request twice."""
    replica = await Replica([Settled((7,))]).add(commit(), "settlement", NOW_US - age_ms * 1000).drain()
    assert (len(replica.background.sent), len(errors_of(caplog)), len(replica.outbox)) == (sent, 1 - sent, 0)


@pytest.mark.parametrize(
    ("request_", "kind", "reply", "logged"),
    [
        (commit(), "deferred", CONFLICT, True),
        (commit(), "settlement", UnknownHoldReply(), True),
        (commit(), "settlement", CONFLICT, False),
        (release(), "deferred", UnknownHoldReply(), False),
        (release(), "release", UnknownHoldReply(), False),
        (release(), "settlement", UnknownHoldReply(), False),
    ],
)
async def test_an_error_is_logged_only_if_spend_is_lost(caplog, request_, kind, reply, logged):
    await Replica([reply]).add(request_, kind).drain()
    assert bool(errors_of(caplog)) is logged


async def test_a_queued_settlement_by_id_is_dropped_with_an_error_if_the_hold_is_unknown(caplog):
    replica = await Replica(found([None])).add(by_id(), "by id").drain()
    assert (replica.outcomes, errors_of(caplog)) == ({"absent": 1}, ["spend of a not recorded: unknown hold"])


async def test_observers_receive_a_replayed_commit_only_if_its_outcome_was_unknown_and_this_replica_made_it():
    ours, others = Settled((7,)), Settled((7,), replayed=True, replica="other")
    replica = Replica([ours, others, Settled((0,)), ours]).add(commit("a"), "settlement").add(commit("b"), "settlement")
    replica.add(commit("deferred"), "deferred").add(release("c"), "settlement")
    await replica.drain()
    assert replica.settled == ["a"]


async def test_a_settlement_sent_from_the_outbox_is_added_to_the_journal():
    replica = Replica([Settled((7,))]).add(commit(), "deferred")
    granted_hold(replica.context, "a", tokens=40)
    await replica.drain()
    assert replica.context.state.journal.open_hold("a") is None
    assert replica.context.state.journal.has_settled("a")


# -- a store that does not reply, or refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "maybe_executed"),
    [
        (Transient("no reply", sent=True), True),
        (Transient("no reply", sent=False), False),
        (StoreUnavailable(""), True),
    ],
)
async def test_a_request_without_a_reply_stays_queued_with_the_time_of_its_first_attempt(error, maybe_executed):
    replica = await Replica(error).add(commit(), "deferred", None).drain()
    [entry] = replica.outbox
    assert (entry.maybe_executed_us or 0) >= NOW_US * maybe_executed
    assert (entry.maybe_executed_us is not None) is maybe_executed


async def test_the_other_requests_are_still_sent_if_one_request_is_refused():
    refused = StoreError("WRONGTYPE")
    replica = Replica(refused, refused, [Settled((7,))]).add(commit("a"), "settlement").add(commit("b"), "settlement")
    await replica.drain()
    assert [entry.hold_id for entry in replica.outbox] == ["a"]


async def test_a_replay_stops_after_one_batch_if_the_store_refuses_everything():
    replica = Replica(StoreError("OOM")).add(commit("a"), "settlement").add(commit("b"), "settlement")
    await replica.drain()
    assert len(replica.background.sent) == 1


async def test_lost_data_is_repaired_before_the_outbox_is_sent():
    replica = await Replica(LOST).add(commit(), "settlement").drain()
    assert replica.repair.active
    await replica.drain()
    assert (len(replica.background.sent), replica.kinds) == (1, ["settlement"])


# -- when --------------------------------------------------------------------------------------------------------------


async def test_the_outbox_is_sent_at_once_when_the_store_replies_again():
    replica = Replica([Settled((7,))]).add(commit(), "deferred")
    replica.background.bind(asyncio.get_running_loop())
    replica.replayer.hasten()
    await replica.background.idle()
    assert len(replica.outbox) == 0


async def test_the_outbox_is_sent_again_at_growing_intervals_while_the_store_is_unreachable():
    replica = Replica(*[NOT_SENT] * 6, [Settled((7,))]).add(commit(), "deferred")
    timers: list[tuple[float, Callable[[], None]]] = []
    loop = SimpleNamespace(
        create_task=asyncio.get_running_loop().create_task, call_later=lambda *timer: timers.append(timer) or object()
    )
    replica.background.bind(loop)
    replica.replayer.schedule()
    for _ in range(7):
        timers[-1][1]()
        await replica.background.idle()
    assert [delay_s for delay_s, _ in timers] == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5]
    assert len(replica.outbox) == 0


@pytest.mark.parametrize("obstacle", ["nothing", "breaker", "repair", "end"])
def test_one_replay_is_scheduled_but_none_during_an_outage_or_a_repair_or_after_the_replayer_has_ended(obstacle):
    replica, loop = Replica(), asyncio.new_event_loop()
    timers: list[float] = []
    loop.call_later = lambda delay_s, callback: timers.append(delay_s) or object()
    replica.background.bind(loop)
    replica.breaker.open, replica.repair.active = obstacle == "breaker", obstacle == "repair"
    if obstacle == "end":
        replica.replayer.end()
    replica.replayer.schedule()
    replica.replayer.schedule()
    loop.close()
    assert len(timers) == (obstacle == "nothing")
