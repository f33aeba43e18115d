"""A replica's state: the clock of the store, data loss, and windows. Time is a value that each test sets."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget, InvalidArgument, UnknownBudget
from ktrdr_budget.engine.protocol.batch import BatchHead
from ktrdr_budget.engine.protocol.keys import stored_window
from ktrdr_budget.engine.protocol.operations import RecordSpend
from ktrdr_budget.engine.protocol.replies import Settled
from ktrdr_budget.engine.protocol.requests import ReadHead
from ktrdr_budget.engine.replica import state as states
from ktrdr_budget.engine.replica.state import SLOW_BATCHES_AFTER_MISS, ReplicaState
from ktrdr_budget.periods import window_named

NOON_MS = 1_796_040_000_000
"""2026-11-30, 12:00 UTC."""
NOON_US = NOON_MS * 1000
DAY_MS = 86_400_000
AGENT = Budget("agent", "5.00")
EVER = Budget("ever", None, period="ever")


class Clock:
    """Replaces the module ``time``: the clock of this machine is five hours slow."""

    def __init__(self) -> None:
        self.running_s = 1000.0

    def monotonic(self) -> float:
        return self.running_s

    def time(self) -> float:
        return NOON_MS / 1000 - 5 * 3600 + self.running_s - 1000


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(states, "time", made)
    return made


class Replica(ReplicaState):
    """A replica that lists its reports of losses, suspicions and late replies."""

    def __init__(self, *budgets: Budget) -> None:
        super().__init__("t", budgets or [AGENT])
        self.reported: list[str] = []
        self.on_loss = lambda: self.reported.append("loss")
        self.on_suspicion = lambda: self.reported.append("suspicion")
        self.on_late_reply = lambda: self.reported.append("late reply")

    def reply(self, acknowledged: int, epoch: str | None = None, *, loss: bool = False) -> None:
        """Send a batch, and absorb this reply to it."""
        self.absorb(BatchHead(NOON_US, loss, acknowledged, epoch, ()), self.header)


def head(epoch: str | None, acknowledged: int = 0) -> ReadHead:
    return ReadHead(NOON_US, epoch, acknowledged, 0)


def test_after_a_fork_a_replica_has_new_ids_and_no_epoch():
    parent, other = Replica(), Replica()
    ids = [parent.new_id(), parent.new_id(), other.new_id()]
    parent.reply(1, "e1")
    parent.renew()
    assert len({*ids, parent.new_id()}) == 4
    assert (parent.epoch, parent.acknowledged, parent.header.started_us) == (None, 0, None)


def test_a_budget_that_is_given_twice_is_refused():
    with pytest.raises(InvalidArgument, match="budget 'agent' is given twice"):
        Replica(AGENT, Budget("agent", "6.00"))


@pytest.mark.parametrize(
    "budget",
    [
        Budget("user:{user}", 1),
        Budget("agent", {"day": 1, "month": 2}),
        Budget("agent", 1, when={}),
        Budget("agent", 1, retention="48h"),
    ],
)
def test_a_limiter_refuses_definitions_that_it_cannot_serve_yet(budget):
    with pytest.raises(InvalidArgument, match="not served yet"):
        Replica(budget)


# -- the store's clock -------------------------------------------------------------------------------------------------


def test_after_a_reply_a_replica_uses_the_clock_of_the_store_instead_of_its_own_clock(clock):
    replica = Replica()
    assert replica.now_ms() == NOON_MS - 5 * 3_600_000, "before the first reply"
    replica.reply(1, "e1")
    clock.running_s += 1.5
    assert replica.now_ms() == NOON_MS + 1500


def test_at_the_first_reply_a_replica_computes_its_start_time_from_the_clock_of_the_store(clock):
    replica = Replica()
    assert replica.claim == (0, replica.replica_id)
    assert replica.header.age_us == 0
    clock.running_s += 2
    sent = replica.header
    clock.running_s += 1
    replica.absorb(BatchHead(NOON_US, False, 1, "e1", ()), sent)
    assert replica.claim == (NOON_US - 2_000_000, replica.replica_id)
    clock.running_s += 10
    replica.reply(2)
    assert replica.claim == (NOON_US - 2_000_000, replica.replica_id), "later replies change nothing"


def test_if_the_clock_of_the_store_is_set_back_the_start_time_of_a_replica_moves_back():
    replica = Replica()
    replica.reply(1, "e1")
    replica.set_clock(NOON_US - 3_600_000_000, 0)
    assert replica.claim[0] == NOON_US - 3_600_000_000
    assert replica.header.started_us == NOON_US - 3_600_000_000


# -- the fast path -----------------------------------------------------------------------------------------------------


def test_one_batch_per_second_skips_the_fast_path(clock):
    replica = Replica()
    assert [replica.use_fast_path() for _ in range(3)] == [False, True, True]
    clock.running_s += 0.99
    assert replica.use_fast_path()
    clock.running_s += 0.01
    assert [replica.use_fast_path() for _ in range(2)] == [False, True]


def test_after_a_miss_of_the_fast_path_the_next_batches_skip_the_fast_path():
    replica = Replica()
    replica.use_fast_path()
    replica.fast_path_missed()
    assert [replica.use_fast_path() for _ in range(SLOW_BATCHES_AFTER_MISS)] == [False] * SLOW_BATCHES_AFTER_MISS
    assert replica.use_fast_path()


# -- data loss ---------------------------------------------------------------------------------------------------------


def test_a_header_has_the_last_epoch_and_the_largest_number_of_acknowledged_writes():
    replica = Replica()
    assert (replica.header.epoch, replica.header.acknowledged) == (None, 0)
    for acknowledged in (2, 1):
        replica.reply(acknowledged, "e1")
    assert (replica.header.epoch, replica.header.acknowledged) == ("e1", 2), "the older reply of two may arrive last"
    assert replica.header is replica.header


def test_a_data_loss_that_two_replies_show_is_reported_once():
    replica = Replica()
    replica.reply(5, "e1")
    sent = replica.header
    for _ in range(2):
        replica.absorb(BatchHead(NOON_US, True, 3, "e2", ()), sent)
    assert replica.reported == ["loss"]
    assert (replica.losses, replica.epoch, replica.acknowledged) == (1, "e2", 3)


def test_a_reply_from_before_a_data_loss_is_reported_as_late_and_changes_no_state():
    replica = Replica()
    replica.reply(5, "e1")
    before = replica.header
    replica.reply(3, "e2", loss=True)
    replica.absorb(BatchHead(NOON_US, False, 6, None, ()), before)
    assert replica.reported == ["loss", "late reply"]
    assert (replica.epoch, replica.acknowledged) == ("e2", 3)


@pytest.mark.parametrize(
    ("found", "confirmed", "reported"),
    [
        (head("e1", 5), True, []),
        (head("e1", 6), True, []),
        (head("e1", 4), False, ["suspicion"]),
        (head("e2", 5), False, ["suspicion"]),
        (head(None), False, ["suspicion"]),
    ],
)
def test_a_read_that_shows_a_different_epoch_or_fewer_writes_is_reported_as_a_possible_loss(found, confirmed, reported):
    replica = Replica()
    replica.reply(5, "e1")
    assert replica.confirms_timeline(found, replica.header) == confirmed
    assert replica.reported == reported


def test_a_read_that_was_sent_before_a_loss_was_detected_causes_no_second_report():
    replica = Replica()
    replica.reply(5, "e1")
    before = replica.header
    replica.reply(3, "e2", loss=True)
    assert not replica.confirms_timeline(head("e1", 5), before)
    assert replica.reported == ["loss"], "and no suspicion"


def test_a_replica_that_has_written_nothing_takes_the_epoch_from_a_read():
    replica = Replica()
    assert replica.confirms_timeline(head(None), replica.header)
    assert replica.confirms_timeline(head("e1"), replica.header)
    assert not replica.confirms_timeline(head("e2"), replica.header)


@pytest.mark.parametrize(("silent_s", "kept"), [(DAY_MS / 1000, True), (DAY_MS / 1000 + 1, False)])
def test_a_replica_clears_its_epoch_and_its_journal_after_more_than_a_day_without_a_reply(clock, silent_s, kept):
    replica = Replica()
    replica.reply(5, "e1")
    op = RecordSpend("op_1", replica.keys.hold("op_1"), [(replica.current_window("agent"), 5)])
    replica.journal_settlement(op, Settled((5,)), NOON_MS)
    clock.running_s += silent_s
    sent = replica.header
    assert (sent.epoch, sent.acknowledged, bool(replica.journal)) == (("e1", 5, True) if kept else (None, 0, False))


# -- windows -----------------------------------------------------------------------------------------------------------


def test_a_replica_returns_the_same_window_object_until_the_window_ends(clock):
    replica = Replica()
    replica.set_clock(NOON_US, 0)
    today = replica.current_window("agent")
    clock.running_s += 12 * 3600 - 0.001
    assert replica.current_window("agent") is today
    clock.running_s += 0.001
    assert replica.current_window("agent").span.name == "2026-12-01"
    assert replica.window("agent", today.stored) is today


def test_a_window_expires_a_day_after_the_end_of_the_retention_but_an_endless_window_never_expires():
    replica = Replica(AGENT, EVER)
    replica.set_clock(NOON_US, 0)
    window = replica.current_window("agent")
    assert window.expires_ms == window.span.end_ms + DAY_MS + 35 * DAY_MS
    assert replica.current_window("ever").expires_ms == 0


def test_a_window_with_an_unknown_timezone_starts_a_day_earlier_and_ends_a_day_later():
    span = window_named("day", "UTC", "2026-11-30")
    stored = stored_window("2026-11-30", "usd,day,Asia/Tokyo,spend")
    for name in ("agent", "team"):
        window = Replica().window(name, stored, "u")
        assert (window.name, window.words[2]) == (f"{name}:{stored}", "-")
        assert (window.span.start_ms, window.span.end_ms) == (span.start_ms - DAY_MS, span.end_ms + DAY_MS)
    assert Replica().window("team", "ever~k3f9a1").span.end_ms is None
    assert Replica().window("team", "a new period~k3f9a1").span.end_ms is None


def test_an_unknown_budget_and_an_invalid_budget_name_raise_different_errors():
    replica = Replica()
    for call in (replica.budget, replica.current_window):
        with pytest.raises(UnknownBudget, match="this limiter has: agent"):
            call("agnet")
    for name in ("a b", None, ["agent"]):
        with pytest.raises(InvalidArgument, match="budget name must match"):
            replica.budget(name)


def test_replayed_spend_counts_in_the_window_of_the_first_attempt():
    replica = Replica()
    replica.set_clock(NOON_US, 0)
    window = replica.current_window("agent")
    yesterday = window.stored.replace("30", "29")
    op = RecordSpend("op_1", replica.keys.hold("op_1"), [(window, 5)])
    settled = Settled((5,), replayed=True, replica=replica.replica_id, windows=(("agent", yesterday),))
    replica.journal_settlement(op, settled, NOON_MS)
    assert [op.windows[0].stored for op in replica.journal.settlements(replica.keys, NOON_MS)] == [yesterday]
