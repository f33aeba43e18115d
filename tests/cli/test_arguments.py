"""Arguments that several commands share: a mistake is reported before a request is sent."""

from __future__ import annotations

import math
from typing import Any

import click
import pytest

from ktrdr_budget.cli.arguments import (
    AmountCommand,
    amounts_of,
    new_id,
    validate_end,
    validate_name,
    validate_seconds,
)

COMMAND = AmountCommand("record", params=[click.Argument(["words"], nargs=-1), click.Option(["--id"])])
CONTEXT = click.Context(COMMAND)
PARAMETER = click.Option(["--until"])


@pytest.mark.parametrize(
    ("words", "amounts"),
    [
        (["agent", "0.15"], {"agent": "0.15"}),
        (["agent=0.15"], {"agent": "0.15"}),
        (["agent=0.15", "calls=1"], {"agent": "0.15", "calls": "1"}),
        (["agent=a=b"], {"agent": "a=b"}),  # the service rejects the amount
    ],
)
def test_an_amount_follows_the_name_of_its_budget_after_a_space_or_an_equals_sign(
    words: list[str], amounts: dict[str, str]
) -> None:
    assert amounts_of(words) == amounts


@pytest.mark.parametrize("words", [[], ["agent"], ["agent", "0.15", "calls"], ["agent=0.15", "calls"]])
def test_a_missing_amount_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(click.UsageError, match="give NAME AMOUNT, or NAME=AMOUNT once or more"):
        amounts_of(words)


def test_a_budget_given_twice_is_a_usage_error() -> None:
    with pytest.raises(click.UsageError, match="budget 'agent' is given twice"):
        amounts_of(["agent=1", "agent=2"])


@pytest.mark.parametrize("words", [["a b", "1"], ["=1"], ["é=1"]])
def test_an_invalid_budget_name_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(click.BadParameter):
        amounts_of(words)
    with pytest.raises(click.BadParameter):
        validate_name(CONTEXT, PARAMETER, words[0].partition("=")[0])


def test_an_absent_name_and_a_valid_name_are_accepted() -> None:
    assert validate_name(CONTEXT, PARAMETER, None) is None
    assert validate_name(CONTEXT, PARAMETER, "agent:cycles") == "agent:cycles"


@pytest.mark.parametrize("amount", ["-1", "-0.5", "-.5"])
def test_a_negative_amount_is_reported_as_an_invalid_amount_not_as_an_unknown_option(amount: str) -> None:
    with pytest.raises(click.UsageError, match="amount") as raised:
        COMMAND.make_context("record", ["agent", amount])
    assert not isinstance(raised.value, click.NoSuchOption)


@pytest.mark.parametrize("words", [["0.15", "--unknown"], ["0.15", "-x"], ["--unknown", "-1"]])
def test_an_unknown_option_is_reported_as_an_unknown_option(words: list[str]) -> None:
    with pytest.raises(click.NoSuchOption):
        COMMAND.make_context("record", ["agent", *words])


@pytest.mark.parametrize(
    ("value", "end"),
    [
        (None, None),
        ("never", None),
        ("window", "window"),
        ("2026-11-24T00:00:00Z", "2026-11-24T00:00:00Z"),
        ("2026-11-24T00:00:00+01:00", "2026-11-24T00:00:00+01:00"),
    ],
)
def test_a_limit_ends_at_an_instant_or_with_the_window_or_never(value: str | None, end: str | None) -> None:
    assert validate_end(CONTEXT, PARAMETER, value) == end


@pytest.mark.parametrize("value", ["2026-11-24T00:00:00", "tomorrow", ""])
def test_a_limit_cannot_end_at_a_time_without_a_timezone(value: str) -> None:
    with pytest.raises(click.BadParameter, match="must be an instant"):
        validate_end(CONTEXT, PARAMETER, value)


@pytest.mark.parametrize("value", [None, 0.1, 2.0, 86_400])
def test_an_absent_duration_and_durations_from_the_minimum_to_one_day_are_accepted(value: Any) -> None:
    assert validate_seconds(0.1)(CONTEXT, PARAMETER, value) == value


@pytest.mark.parametrize("value", [0.09, 86_400.1, math.nan, math.inf])
def test_a_duration_below_the_minimum_or_above_one_day_is_refused(value: float) -> None:
    with pytest.raises(click.BadParameter, match="is not from 0.1 to 86400 seconds"):
        validate_seconds(0.1)(CONTEXT, PARAMETER, value)


def test_each_generated_id_is_unique_and_valid() -> None:
    ids = {new_id("op") for _ in range(100)}
    assert len(ids) == 100
    assert all(validate_name(CONTEXT, PARAMETER, made) and made.startswith("op_") for made in ids)
