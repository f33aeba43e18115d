"""The facade for a daily budget, on real servers."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ktrdr_budget.tracker as module
from ktrdr_budget import BudgetExceeded, BudgetTracker, InvalidAmount, StoreUnavailable, get_budget_tracker
from ktrdr_budget.environment import ZERO_BUDGET


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in (
        "AGENT_DAILY_BUDGET",
        "KTRDR_AGENT_DAILY_BUDGET",
        "AGENT_BUDGET_DIR",
        "KTRDR_REDIS_URL",
        "KTRDR_TENANT",
    ):
        monkeypatch.delenv(name, raising=False)


def test_a_new_tracker_has_the_full_daily_budget(server):
    with BudgetTracker(1.0, url=server.url) as tracker:
        assert tracker.daily_limit == 1.0
        assert tracker.get_today_spend() == 0.0
        assert tracker.get_remaining() == 1.0
        assert tracker.can_spend() == (True, "ok")


def test_spend_recorded_twice_with_the_same_label_counts_twice(server):
    with BudgetTracker(1.0, url=server.url) as tracker:
        tracker.record_spend(0.3, "op one, with spaces")
        tracker.record_spend(0.3, "op one, with spaces")
        assert tracker.get_today_spend() == 0.6
        status = tracker.get_status()
        assert status == {
            "date": status["date"],
            "daily_limit": 1.0,
            "today_spend": 0.6,
            "remaining": 0.4,
            "cycles_affordable": 2,
            "spend_events": 2,
        }
        [first, second] = tracker.limiter.ledger("agent")
        assert first.operation == second.operation == "op one, with spaces"


def test_recorded_spend_is_logged_with_total_and_remainder(server, caplog):
    caplog.set_level(logging.INFO, "ktrdr_budget")
    with BudgetTracker(1.0, url=server.url) as tracker:
        tracker.record_spend(0.3, "op_1")
        tracker.record_spend("0.0000015", "op_2\nINFO: forged")
    first, second = (record for record in caplog.records if record.message.startswith("Budget spend recorded"))
    assert first.levelname == "INFO"
    assert first.message == "Budget spend recorded: $0.30 for op_1 (total: $0.30, remaining: $0.70)"
    assert (first.amount, first.operation_id, first.total_spend, first.remaining) == (0.3, "op_1", 0.3, 0.7)
    assert second.message == (
        "Budget spend recorded: $0.0000015 for op_2?INFO: forged (total: $0.3000015, remaining: $0.6999985)"
    )


def test_record_spend_on_an_unlimited_budget_reads_the_status_only_if_the_spend_is_logged(server, caplog, monkeypatch):
    monkeypatch.setenv("AGENT_DAILY_BUDGET", "unlimited")
    with BudgetTracker(url=server.url) as tracker:
        caplog.set_level(logging.INFO, "ktrdr_budget")
        tracker.record_spend(0.3, "op_1")
        [record] = caplog.records
        assert (record.message.partition(" (")[2], record.remaining) == ("total: $0.30, remaining: unlimited)", None)
        caplog.set_level(logging.WARNING, "ktrdr_budget")
        monkeypatch.setattr(tracker, "_status", lambda: pytest.fail("it was read"))
        tracker.record_spend(0.3, "op_1")


def test_a_denial_by_can_spend_shows_the_remaining_and_the_needed_amount(server):
    with BudgetTracker("0.25", url=server.url) as tracker:
        tracker.record_spend("0.15", "a")
        assert tracker.can_spend(0.15) == (False, "budget_exhausted ($0.10 remaining, need $0.15)")
        assert tracker.can_spend(0.10) == (True, "ok")


def test_a_hold_reduces_the_remainder_and_a_commit_counts_the_real_cost(server):
    with BudgetTracker(0.20, url=server.url) as tracker:
        hold = tracker.reserve(0.15, "cycle")
        assert tracker.get_remaining() == 0.05
        with pytest.raises(BudgetExceeded):
            tracker.reserve(0.15)
        hold.commit(0.07)
        assert tracker.get_today_spend() == 0.07
        with tracker.hold(0.10) as second:
            second.accrue("0.02")
        assert tracker.get_today_spend() == 0.09


def test_the_limit_is_read_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("KTRDR_REDIS_URL", server.url)
    monkeypatch.setenv("KTRDR_AGENT_DAILY_BUDGET", "2.50")
    with BudgetTracker() as tracker:
        assert tracker.daily_limit == 2.5
    monkeypatch.setenv("AGENT_DAILY_BUDGET", "unlimited")
    with BudgetTracker() as tracker:
        assert tracker.daily_limit is None
        assert tracker.get_remaining() == math.inf
        assert tracker.can_spend(1000) == (True, "ok")
        assert tracker.get_status()["cycles_affordable"] is None
    monkeypatch.setenv("AGENT_DAILY_BUDGET", "a lot")
    with pytest.raises(InvalidAmount, match="AGENT_DAILY_BUDGET"):
        BudgetTracker()


@pytest.mark.parametrize(
    ("label", "kept"),
    [("x" * 300, "x" * 256), (42, "42"), (None, ""), ("a b \u00e9/:|,\n", "a b \u00e9/:|,\n"), ("\ud800", "?")],
)
def test_spend_is_recorded_even_if_the_label_is_invalid(server, label, kept):
    with BudgetTracker(1.0, url=server.url) as tracker:
        tracker.record_spend(0.25, label)
        [entry] = tracker.limiter.ledger("agent")
        assert (entry.operation, tracker.get_today_spend()) == (kept, 0.25)


def test_a_limit_of_zero_denies_all_and_logs_a_warning(server, caplog):
    with BudgetTracker(0, url=server.url) as tracker:
        assert caplog.messages == [ZERO_BUDGET]
        assert "AGENT_DAILY_BUDGET=unlimited" in ZERO_BUDGET
        assert tracker.can_spend(0.01) == (False, "budget_exhausted ($0.00 remaining, need $0.01)")
        with pytest.raises(BudgetExceeded):
            tracker.reserve(0.01)


def test_spend_is_still_recorded_after_the_process_and_the_server_restart(tmp_path: Path):
    code = (
        "import sys; from ktrdr_budget import BudgetTracker as T; t = T(1, sys.argv[1]); {}; print(t.get_today_spend())"
    )
    spend = [sys.executable, "-c", code.format("t.record_spend(0.25, 'x')"), str(tmp_path / "d")]
    read = [sys.executable, "-c", code.format("pass"), str(tmp_path / "d")]
    environment = {**os.environ, "KTRDR_TIMEOUT": "20"}  # tolerates a busy machine
    assert subprocess.check_output(spend, text=True, env=environment).strip() == "0.25"
    assert subprocess.check_output(read, text=True, env=environment).strip() == "0.25"


def test_get_remaining_raises_an_error_and_can_spend_denies_if_the_store_is_unreachable(
    tmp_path: Path,
):
    with BudgetTracker(1, url=f"unix://{tmp_path}/nobody") as tracker:
        with pytest.raises(StoreUnavailable):
            tracker.get_remaining()
        allowed, reason = tracker.can_spend(0.1)
        assert not allowed
        assert reason.startswith("budget_unavailable")


def test_threads_that_share_a_tracker_are_granted_exactly_the_limit(server):
    with BudgetTracker(1, url=server.url) as tracker:
        granted = []

        def spend():
            for _ in range(10):
                try:
                    granted.append(tracker.reserve("0.05").id)
                except BudgetExceeded:
                    return

        threads = [threading.Thread(target=spend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(granted) == 20
        assert tracker.get_remaining() == 0.0


def test_repeated_calls_of_get_budget_tracker_return_the_same_tracker(server, monkeypatch):
    monkeypatch.setenv("KTRDR_REDIS_URL", server.url)
    monkeypatch.setattr(module, "_tracker", None)
    tracker = get_budget_tracker()
    try:
        assert get_budget_tracker() is tracker
        assert tracker.daily_limit == 5.0
    finally:
        tracker.close()


def test_a_tracker_restarted_with_a_new_limit_applies_the_new_limit_at_once(server):
    with BudgetTracker(1, url=server.url) as tracker:
        tracker.reserve("0.50").commit("0.50")
    with BudgetTracker(0.25, url=server.url) as tracker:
        assert tracker.can_spend(0.1) == (False, "budget_exhausted ($0.00 remaining, need $0.10)")
