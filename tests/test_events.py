"""Log records of spend and denials: one line for people, and fields for log processors."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from ktrdr_budget.events import log_denial, log_exhausted, log_spend, logs_spend, one_line
from ktrdr_budget.models import Denial, Status

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
DENIAL = Denial(
    "team", "budget_held",
    limit=Decimal("5.00"), spent=Decimal("4.84"), held=Decimal("0.15"), unconfirmed=Decimal("0.00"),
    remaining=Decimal("0.01"), requested=Decimal("0.15"), fits=Decimal("0.01"), retry_after=60,
)  # fmt: skip


def status(limit: str | None) -> Status:
    """A status with 15 cents spent."""
    cap, nothing = None if limit is None else Decimal(limit), Decimal("0.00")
    return Status(
        "agent", "usd", "spend", "day", "UTC", "2026-11-30", NOON, NOON,
        limit=cap, spent=Decimal("0.15"), held=nothing, unconfirmed=nothing, events=1, overruns=0,
        limit_source="configured", limit_until=None, configured_limit=cap, as_of=NOON,
    )  # fmt: skip


def fields(record: logging.LogRecord, *names: str) -> tuple[object, ...]:
    return tuple(getattr(record, name) for name in names)


@pytest.mark.usefixtures("info_log")
@pytest.mark.parametrize(
    ("found", "words", "figures"),
    [
        (status("5.00"), "total: $0.15, remaining: $4.85", (0.07, 0.15, 4.85)),
        (status(None), "total: $0.15, remaining: unlimited", (0.07, 0.15, None)),
        (None, "total: unknown, remaining: unknown", (0.07, None, None)),
    ],
)
def test_the_log_record_of_spend_shows_the_total_and_the_remainder_if_known(caplog, found, words, figures):
    log_spend(Decimal("0.07"), "op_1", found)
    [record] = caplog.records
    assert (record.levelname, record.message) == ("INFO", f"Budget spend recorded: $0.07 for op_1 ({words})")
    assert fields(record, "amount", "total_spend", "remaining") == figures


@pytest.mark.usefixtures("info_log")
def test_a_newline_in_an_id_adds_no_line_to_the_log(caplog):
    log_spend(Decimal("0.07"), "op_1\nBudget spend recorded: $9.00", None)
    [record] = caplog.records
    assert "\n" not in record.message
    assert record.operation_id == "op_1?Budget spend recorded: $9.00"
    assert one_line("a\tb\x1b[31m\u2028é") == "a?b?[31m?é"
    assert one_line("x" * 300) == "x" * 256


def test_spend_is_logged_if_the_level_is_info_but_not_if_the_level_is_warning(caplog):
    for level, logged in ((logging.INFO, True), (logging.WARNING, False)):
        caplog.set_level(level, "ktrdr_budget")
        assert logs_spend() == logged


def test_the_log_record_of_a_denied_trigger_has_the_general_and_the_specific_reason(caplog):
    log_exhausted("op_1", DENIAL, "budget_exhausted ($0.01 remaining, need $0.15)")
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == "Budget exhausted: budget_exhausted ($0.01 remaining, need $0.15)"
    assert fields(record, "operation_id", "reason", "denial_reason") == ("op_1", "budget_exhausted", "budget_held")
    assert fields(record, "remaining", "requested") == (0.01, 0.15)


def test_a_denied_reservation_is_logged_with_budget_and_window(caplog):
    log_denial(DENIAL, "2026-11-30")
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        "Reservation denied: team: budget_held ($0.01 remaining, need $0.15); "
        "further denials in window 2026-11-30 are not logged"
    )
    assert fields(record, "budget", "window", "reason") == ("team", "2026-11-30", "budget_held")
    assert fields(record, "remaining", "requested") == (0.01, 0.15)
