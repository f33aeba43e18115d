"""The reader of the audit: it reads a window at one instant, and only those ledger entries that it has not read yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest

from ktrdr_budget import Budget
from ktrdr_budget.audit.reader import AuditReader, Ledger
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.errors import StoreUnavailable
from ktrdr_budget.money import to_units
from ktrdr_budget.testing import MemoryLimiter, memory_server

BUDGETS = [Budget("agent", "5.00", period="ever")]


def entry(units: int, kind: str = "commit", hold_id: str = "h") -> bytes:
    return f"1 {units} {kind} {hold_id} - - -".encode()


def ledger_of(*entries: bytes) -> Ledger:
    ledger = Ledger()
    for text in entries:
        ledger.add(text)
    return ledger


# -- the sums of a ledger ----------------------------------------------------------------------------------------------


def test_a_ledger_adds_up_its_entries():
    ledger = ledger_of(entry(5), entry(3, "record"), entry(-2, "release"))
    assert (ledger.number, ledger.total, ledger.events, ledger.last) == (3, 6, 2, entry(-2, "release"))


def test_the_charge_of_an_expired_hold_is_unconfirmed_until_a_correction_is_added():
    ledger = ledger_of(entry(5, "expiry", "a"), entry(3, "expiry", "b"))
    assert ledger.unconfirmed == 8
    ledger.add(entry(-1, "correction", "a"))
    assert (ledger.unconfirmed, ledger.total) == (3, 7)


def test_a_summary_of_seven_trimmed_entries_counts_as_seven_entries_but_as_no_spend_event():
    ledger = ledger_of(entry(50, "carried", "7"), entry(3))
    assert (ledger.number, ledger.total, ledger.events, ledger.carried) == (8, 53, 1, True)


@pytest.mark.parametrize(
    ("head", "trimmed_count", "newest", "continues"),
    [
        (b"first", 0, 3, True),
        (b"first", 0, 2, True),
        (b"first", 0, 1, False),  # entries were removed at the end
        (b"other", 0, 3, False),  # another ledger
        (b"summary", 2, 3, True),  # trimmed up to the last entry that was read
        (b"summary", 3, 4, False),  # trimmed beyond it
    ],
)
def test_reading_a_ledger_continues_at_the_last_entry_unless_entries_are_missing(
    head, trimmed_count, newest, continues
):
    ledger = Ledger(number=2, last=b"second", head=b"first")
    assert ledger.continues_at(head, trimmed_count, newest) == continues


def test_reading_a_ledger_continues_after_the_summary_if_all_earlier_entries_were_trimmed():
    ledger = Ledger(number=2, last=b"second", head=b"first")
    assert ledger.continues_at(b"summary", 2, 3)
    assert (ledger.head, ledger.last, ledger.trimmed_count) == (b"summary", b"summary", 2)


# -- windows -----------------------------------------------------------------------------------------------------------


class Audited:
    """A limiter in memory, and the reader and client of its server."""

    def __init__(self) -> None:
        server = memory_server()
        self.limiter = MemoryLimiter(BUDGETS, server=server)
        self.client: Any = fakeredis.FakeRedis(server=server)
        self.keys = Keys("default")
        self.reader = AuditReader(self.client, self.keys)

    @property
    def window(self) -> tuple[str, str]:
        (window,) = self.reader.windows()
        return window


@pytest.fixture
def audited() -> Iterator[Audited]:
    made = Audited()
    with made.limiter:
        made.limiter.record("agent", "0.10")
        made.limiter.reserve("agent", "0.15")
        yield made


def test_the_counters_in_a_snapshot_agree_with_the_ledger_and_the_replica_subtotals_and_the_holds(audited):
    snapshot = audited.reader.snapshot(*audited.window)
    assert (snapshot.spent, snapshot.held, snapshot.events) == (to_units("0.10"), to_units("0.15"), 1)
    assert snapshot.ledger.total == snapshot.replica_subtotals == snapshot.spent
    assert snapshot.holds_sum == snapshot.held
    assert not snapshot.vanished


def test_a_later_snapshot_reads_only_the_new_ledger_entries(audited):
    first = audited.reader.snapshot(*audited.window).ledger
    audited.limiter.record("agent", "0.20")
    second = audited.reader.snapshot(*audited.window).ledger
    assert second is first
    assert (second.number, second.total) == (2, to_units("0.30"))
    audited.reader.keep_ledgers_of([])
    assert audited.reader.snapshot(*audited.window).ledger is not first


def test_the_snapshot_of_a_window_is_marked_as_vanished_if_the_key_of_the_window_is_missing(audited):
    audited.client.delete(audited.keys.window(*audited.window))
    snapshot = audited.reader.snapshot(*audited.window)
    assert (snapshot.vanished, snapshot.spent, snapshot.ledger.total) == (True, 0, to_units("0.10"))


def test_the_audit_raises_store_unavailable_if_the_store_has_lost_its_data(audited):
    window = audited.window
    audited.reader.check_epoch()
    audited.client.flushall()
    with pytest.raises(StoreUnavailable, match="data loss detected"):
        audited.reader.check_epoch()
    with pytest.raises(StoreUnavailable, match="data loss detected"):
        audited.reader.snapshot(*window)


def test_the_same_correction_changes_a_counter_only_once(audited):
    window = audited.window
    audited.client.hincrby(audited.keys.window(*window), "held", 7)
    snapshot = audited.reader.snapshot(*window)
    corrected = audited.reader.correct(*window, snapshot, {"held": -7}, 0, "audit")
    assert corrected == {"held": (to_units("0.15") + 7, to_units("0.15"))}
    assert audited.reader.correct(*window, snapshot, {"held": -7}, 0, "audit") is None
    assert audited.reader.snapshot(*window).held == to_units("0.15")


def test_reindexing_adds_the_missing_index_entry_of_a_hold_and_removes_a_stray_entry(audited):
    (hold,) = audited.limiter.holds("agent").items
    audited.client.delete(audited.keys.due)
    audited.client.zadd(audited.keys.due, {"stray": 1})
    changes = audited.reader.reindex()
    assert sorted(changes) == [("+due", hold.id), ("-due", "stray")]
    assert audited.reader.reindex() == []
