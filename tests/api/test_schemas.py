"""Schemas of requests and responses: amounts stay exact, and responses contain documented fields only."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from ktrdr_budget.api.schemas import (
    AgentBudgetOut,
    CommitIn,
    InvalidJSON,
    LimitIn,
    PageQuery,
    ReservationIn,
    amount_json,
    instant_json,
)
from ktrdr_budget.models import TTL_DEFAULT_S


def error_of(model: type[BaseModel], document: Any) -> str:
    with pytest.raises(ValidationError) as raised:
        model.model_validate(document)
    (error,) = raised.value.errors()
    return error["msg"]


def test_a_reservation_requires_only_the_amounts():
    made = ReservationIn.model_validate({"amounts": {"agent": "0.15"}})
    assert (made.id, made.ttl, made.on_expiry, made.operation) == (None, TTL_DEFAULT_S, "charge", "")


@pytest.mark.parametrize("amount", ["0.15", "1e-9", 3, Decimal("0.1")])
def test_a_valid_amount_is_kept_exactly_as_sent(amount):
    assert ReservationIn(amounts={"agent": amount}).amounts == {"agent": amount}


@pytest.mark.parametrize("amount", ["", "-1", "+1", "0x1", "NaN", "1_000", ".5", 0.1, True, None])
def test_a_malformed_amount_is_refused(amount):
    error_of(ReservationIn, {"amounts": {"agent": amount}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amounts": {}}, "an amount for each of 1 to 64 budgets"),
        ({"amounts": {f"b{number}": 1 for number in range(65)}}, "an amount for each of 1 to 64 budgets"),
        ({"amounts": {"a b": 1}}, "must match"),
        ({"id": "x" * 129}, "must match"),
        ({"ttl": 0}, "must be a number of seconds from 1 to"),
        ({"ttl": True}, "must be a number of seconds from 1 to"),
        ({"operation": "x" * 257}, "a string of at most 256 characters"),
        ({"operation": "\ud800"}, "without lone surrogates"),
        ({"unknown": 1}, "Extra inputs are not permitted"),
    ],
)
def test_the_error_for_an_invalid_field_states_the_allowed_values(changes, message):
    assert message in error_of(ReservationIn, {"amounts": {"agent": "0.15"}, **changes})


def test_the_refusal_of_a_non_json_body_states_the_reason():
    assert error_of(ReservationIn, InvalidJSON("a comma is missing")) == "not JSON: a comma is missing"
    assert "application/json" in error_of(ReservationIn, b'{"amounts": {"agent": 1}}')


def test_a_commit_may_have_no_amount_or_a_single_amount_or_an_amount_for_each_budget():
    assert CommitIn.model_validate({}).amounts is None
    assert CommitIn(amounts="0.07").amounts == "0.07"
    assert CommitIn(amounts={"agent": "0.07"}).amounts == {"agent": "0.07"}


@pytest.mark.parametrize(
    ("until", "end"),
    [
        (None, None),
        ("window", "window"),
        ("2026-11-24T01:00:00+01:00", datetime(2026, 11, 24, tzinfo=UTC)),
        ("2026-11-24t00:00:00z", datetime(2026, 11, 24, tzinfo=UTC)),
    ],
)
def test_a_limit_may_last_forever_or_until_the_window_ends_or_until_an_instant(until, end):
    given = LimitIn(limit="10.00", until=until).until
    assert str(given) == str(end), "an instant is in UTC"


@pytest.mark.parametrize("until", ["2026-11-24T00:00:00", "2026-11-24", "2026-13-01T00:00:00Z", "never", 0])
def test_a_limit_is_refused_if_the_time_at_which_it_ends_is_invalid(until):
    assert "must be 'window', or an instant with its offset" in error_of(LimitIn, {"limit": None, "until": until})


@pytest.mark.parametrize("size", ["0", "1001", "-1", "1.0", ""])
def test_the_number_of_items_in_a_page_must_be_from_1_to_1000(size):
    assert [PageQuery(limit=limit).limit for limit in ("1", "1000")] == [1, 1000]
    assert error_of(PageQuery, {"limit": size}) == "Value error, must be a whole number from 1 to 1000"


def test_amounts_are_written_without_an_exponent():
    assert [amount_json(amount) for amount in (Decimal("1E-9"), Decimal("0.10"), 3)] == ["0.000000001", "0.10", 3]


def test_an_instant_is_written_with_milliseconds_only_if_the_milliseconds_are_not_zero():
    noon = datetime(2026, 11, 23, 12, tzinfo=UTC)
    assert instant_json(noon) == "2026-11-23T12:00:00Z"
    assert instant_json(noon.replace(microsecond=125_000)) == "2026-11-23T12:00:00.125Z"


def test_an_agent_budget_without_a_recovery_has_plain_amounts_and_no_recovery_field():
    figures = {"window": "2026-11-23", "limit": None, "spent": Decimal("0.000000001"), "remaining": None, "events": 1}
    made = AgentBudgetOut.model_validate({**figures, "held": 0, "unconfirmed": 0, "resets_at": None})
    written = made.model_dump(mode="json")
    assert written["today_spend"] == "0.000000001"
    assert "recovering_until" not in written
