"""The repair after a data loss: how it is detected, what is replayed, and what a failure changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ktrdr_budget import Budget, StoreError, StoreUnavailable
from ktrdr_budget.engine.batching.loss_repair import LossRepair
from ktrdr_budget.engine.protocol.batch import BatchHead
from ktrdr_budget.engine.protocol.codes import COMMITTED, CommitMode
from ktrdr_budget.engine.protocol.operations import Commit, CommitAmount, ReplayLimit, ReplayTotal, Restore
from ktrdr_budget.engine.protocol.replies import MissingWindow, Restored, Settled, Unreadable
from ktrdr_budget.engine.protocol.requests import Read

from ...helpers.background import LOST, ScriptedBackground
from ...helpers.calls import NOW_MS, NOW_US, call_context, errors_of, found, granted_hold, hold_record
from ...helpers.waiting import until

TOKENS = Budget("tokens", 1000, unit="tokens")
AGAIN = Restored(False)
"""Reply to a replayed record that the store still has."""


class Replica:
    """A replica and its repair; its journal has a limit set at run time, a settlement and an open hold."""

    def __init__(self, *replies: Any, with_journal: bool = True) -> None:
        self.context = call_context(TOKENS)
        self.state = self.context.state
        self.background = ScriptedBackground(self.state, *replies)
        self.breaker = SimpleNamespace(open=False)
        self.waits: list[Exception | None] = []
        self.ends = 0
        self.loses_again = False
        """Whether a further loss is detected during the first batch."""
        self.policy_checks: list[str] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.background.later = self.later
        self.repair = LossRepair(
            self.background,
            self.breaker,
            check_policy=lambda: self.policy_checks.append("check"),
            on_wait=self.on_wait,
            on_end=self.on_end,
        )
        self.state.on_loss = lambda: None
        if with_journal:
            self.state.journal.limit_changed(TOKENS, 2000, 0, NOW_US)
            self.settle("settled", 7)
            granted_hold(self.context, "open", tokens=40)

    def later(self, delay_s: float, method: Callable[[], None]) -> object:
        self.timers.append((delay_s, method))
        return SimpleNamespace(cancel=lambda: None)

    def on_wait(self, error: Exception | None) -> None:
        self.waits.append(error)
        if self.loses_again:
            self.loses_again = False
            self.repair.begin_again()

    def on_end(self) -> None:
        assert not self.repair.active, "calls may be sent again"
        self.ends += 1

    def settle(self, hold_id: str, units: int) -> None:
        window = self.state.current_window("tokens")
        op = Commit(hold_id, self.state.keys.hold(hold_id), [window], [CommitAmount(CommitMode.EXACT, units)])
        self.state.journal.settled(op, Settled((units,)), self.state.now_ms())

    async def repaired(self) -> Replica:
        self.background.bind(asyncio.get_running_loop())
        self.repair.begin()
        assert self.repair.active, "calls wait"
        await self.background.idle()
        self.repair.stop()
        return self

    @property
    def sent(self) -> list[list[tuple[type, str]]]:
        return [[(type(op), op.hold_id) for op in batch] for batch in self.background.sent if isinstance(batch, list)]


LIMITS_AND_SETTLEMENTS = [(ReplayLimit, "-"), (Restore, "settled")]
TOTALS, HOLDS = [(ReplayTotal, "-")], [(Restore, "open")]
WHOLE = [LIMITS_AND_SETTLEMENTS, TOTALS, HOLDS]
REPLIES = [Restored(True), Settled((7,))], [Settled((0,))], [Restored(True)]


# -- replay ------------------------------------------------------------------------------------------------------------


async def test_a_repair_replays_limits_and_settlements_first_then_totals_then_open_holds(caplog):
    replica = await Replica(*REPLIES).repaired()
    assert replica.sent == WHOLE
    assert replica.ends == 1
    assert caplog.messages == [
        "restored the limits that were set or cleared at run time: tokens",
        "journal replayed to the store at store:1: 1 settlements, 1 open holds, older spend of 0 windows",
    ]


async def test_a_repair_does_not_count_records_that_the_store_still_had(caplog):
    replica = await Replica([AGAIN, Settled((7,), replayed=True)], [Settled((3,))], [AGAIN]).repaired()
    total = replica.repair.total
    assert (total.settlements, total.holds, total.windows) == (0, 0, 1)
    assert "restored" not in caplog.text


@pytest.mark.parametrize("batches", [0, 1, 2])
async def test_a_replay_starts_again_if_the_store_reports_a_further_loss(batches):
    replica = await Replica(*REPLIES[:batches], LOST, *REPLIES).repaired()
    assert replica.sent == [*WHOLE[: batches + 1], *WHOLE]
    assert replica.repair.total.settlements == 1


async def test_a_repair_is_repeated_if_a_new_loss_is_detected_during_the_repair():
    replica = Replica(*REPLIES, *REPLIES)
    replica.loses_again = True
    assert (await replica.repaired()).sent == [*WHOLE, *WHOLE]


async def test_one_repair_runs_at_a_time():
    replica = Replica(*REPLIES)
    replica.background.bind(asyncio.get_running_loop())
    replica.repair.begin()
    assert (await replica.repaired()).sent == WHOLE


async def test_the_error_is_reported_and_the_whole_journal_is_sent_again_if_a_replay_gets_no_reply():
    error = StoreUnavailable("no reply")
    replica = await Replica(error, *REPLIES).repaired()
    assert replica.sent == [LIMITS_AND_SETTLEMENTS, *WHOLE]
    assert replica.waits[0] is error


async def test_the_other_operations_are_still_replayed_if_one_operation_is_refused(caplog):
    refused = StoreError("WRONGTYPE")
    replica = await Replica(refused, [Restored(True)], refused, *REPLIES[1:]).repaired()
    assert replica.sent[1:3] == [[each] for each in LIMITS_AND_SETTLEMENTS]
    assert (replica.sent[3:], replica.repair.total.holds) == ([TOTALS, HOLDS], 1)
    assert errors_of(caplog) == ["replay of settled failed: WRONGTYPE"]


async def test_an_unreadable_key_is_logged_and_the_repair_continues(caplog):
    await Replica([AGAIN, Unreadable("WRONGTYPE")], *REPLIES[1:]).repaired()
    assert errors_of(caplog) == ["replay of settled failed: WRONGTYPE"]


async def test_a_replay_is_repeated_later_if_a_window_is_missing_during_a_slot_migration(caplog):
    missing = [AGAIN, MissingWindow("tokens:now")], *REPLIES[1:]
    replica = Replica(*missing, *missing)
    replica.background.bind(asyncio.get_running_loop())
    replica.repair.begin()
    await replica.background.idle()
    [(delay_s, begin_again)] = replica.timers
    assert (delay_s, replica.repair.active) == (1.0, False)
    assert "replay postponed, windows missing: tokens:now" in caplog.messages
    begin_again()
    await replica.background.idle()
    assert replica.sent == [*WHOLE, *WHOLE]
    assert replica.timers[1][0] == 2.0, "still missing: later"


async def test_one_error_after_a_loss_says_how_many_settlements_the_journal_had_dropped(caplog):
    replica = Replica(*REPLIES, *REPLIES)
    replica.state.losses, replica.state.journal.forgotten_settlements = 1, 5
    await replica.repaired()
    await replica.repaired()
    assert len(errors_of(caplog)) == 1
    assert "5 settlements" in errors_of(caplog)[0]


# -- detection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reply", "begins"), [(LOST, True), ([], False), (StoreUnavailable("no reply"), False)])
async def test_a_suspected_loss_is_repaired_only_if_a_probe_confirms_the_loss(reply, begins):
    replica = Replica(reply, [], [], [], with_journal=False)
    replica.background.bind(asyncio.get_running_loop())
    replica.repair.suspect()
    replica.repair.suspect()
    await replica.background.idle()
    assert len(replica.sent) == 1, "one probe at a time, and an empty journal needs no batch"
    assert replica.ends == begins


@pytest.mark.parametrize(("with_journal", "is_open", "probes"), [(True, False, 1), (False, False, 0), (True, True, 0)])
async def test_an_idle_replica_with_entries_in_its_journal_probes_the_store_periodically(with_journal, is_open, probes):
    replica = Replica([], with_journal=with_journal)
    replica.breaker.open = is_open
    replica.background.bind(asyncio.get_running_loop())
    replica.repair.start()
    [(_, pulse)] = replica.timers
    pulse()
    await replica.background.idle()
    assert replica.sent == [[]] * probes
    assert len(replica.timers) == 2, "the next pulse"


async def test_a_limiter_used_without_start_checks_the_eviction_policy_after_the_first_reply():
    replica = Replica(with_journal=False)
    replica.background.bind(asyncio.get_running_loop())
    replica.repair.start()
    replica.timers[0][1]()
    assert replica.policy_checks == []
    replica.state.absorb(BatchHead(NOW_US, False, 1, "epoch", ()), replica.state.header)
    replica.timers[1][1]()
    assert replica.policy_checks == ["check"]
    replica.state.policy_checked = True
    replica.timers[2][1]()
    assert replica.policy_checks == ["check"]


async def test_a_closed_replica_or_a_replica_under_repair_sends_no_probe():
    replica = Replica(*REPLIES)
    replica.background.bind(asyncio.get_running_loop())
    replica.repair.begin()
    replica.repair.suspect()
    await replica.background.idle()
    replica.background.closed = True
    replica.repair.suspect()
    assert (replica.sent, replica.background.tasks) == (WHOLE, set())


async def test_a_replica_checks_after_each_pair_of_probes_if_other_replicas_have_settled_its_holds():
    replica = Replica([], [], found([None]))
    replica.state.set_clock((NOW_MS + 60_000) * 1000, 0)
    replica.background.bind(asyncio.get_running_loop())
    replica.repair.start()
    for pulse in range(2):
        replica.timers[pulse][1]()
        await replica.background.idle()
    assert [type(sent) for sent in replica.background.sent] == [list, list, Read]


async def test_a_repair_sends_nothing_while_the_circuit_breaker_is_open():
    replica = Replica(*REPLIES)
    replica.breaker.open = True
    replica.background.bind(asyncio.get_running_loop())
    replica.repair.begin()
    await until(lambda: replica.waits)
    assert replica.sent == []
    replica.breaker.open = False
    await replica.background.idle()
    assert replica.sent == WHOLE


@pytest.mark.parametrize(("state", "stays"), [("o", True), (COMMITTED, False)])
async def test_a_hold_settled_by_another_replica_is_removed_from_the_journal(state, stays):
    """A later replay could reopen it."""
    replica = Replica()
    record = hold_record(replica.context, state, tokens=40).render()
    replica.background.replies.append(found([record], now_us=NOW_US + 1))
    replica.state.set_clock((NOW_MS + 60_000) * 1000, 0)
    await replica.repair.check_holds()
    assert (replica.state.journal.open_hold("open") is not None) is stays
