"""The usage of one response: its reports are merged, and the result is used only if it is credible."""

from __future__ import annotations

from typing import Any

import pytest

from ktrdr_budget.metering.guards.bounds import Bound
from ktrdr_budget.metering.guards.usage_parser import UsageParser, count_of
from ktrdr_budget.metering.usage import Usage


class Parser(UsageParser):
    """A format with two counts."""

    def usage_of(self, counts: dict[str, Any]) -> Usage | None:
        if not self.is_credible(counts.get("in", 0), counts.get("out")):
            return None
        return Usage(counts["in"], counts.get("out", 0))


def parser(output_tokens_max: int = 100) -> Parser:
    return Parser(Bound("m", 1000, output_tokens_max))


def test_a_later_report_with_lower_or_missing_counts_does_not_reduce_the_usage() -> None:
    made = parser()
    for report in ({"in": 9, "out": 5}, {"out": 7}, {"in": 3, "out": 6}):
        assert made.merge(report)
    assert made.usage == Usage(9, 7)


@pytest.mark.parametrize("report", [None, {}, [], "usage", 7])
def test_a_report_that_is_not_an_object_or_is_empty_is_ignored(report: object) -> None:
    made = parser()
    assert not made.merge(report)
    assert made.usage is None


def test_nested_counts_of_several_reports_are_merged_field_by_field() -> None:
    seen: list[dict[str, Any]] = []

    class Nested(Parser):
        def usage_of(self, counts: dict[str, Any]) -> None:
            seen.append(counts)

    made = Nested(Bound("m", 1000, 100))
    made.merge({"details": {"cached": 5, "audio": 1}, "tier": "flex"})
    made.merge({"details": {"cached": 2, "audio": 3}, "tier": "priority"})
    made.merge({"details": None, "tier": None})
    assert seen[-1] == {"details": {"cached": 5, "audio": 3}, "tier": "priority"}


@pytest.mark.parametrize(
    ("value", "count"), [(0, 0), (7, 7), (7.0, 7), (7.5, None), (-1, None), (True, None), ("7", None)]
)
def test_only_a_non_negative_whole_number_is_accepted_as_a_count(value: object, count: int | None) -> None:
    assert count_of(value) == count


@pytest.mark.parametrize(
    ("input_tokens", "output_tokens", "output_tokens_max", "credible"),
    [(9, 5, 100, True), (9, 0, 100, True), (0, 5, 100, False), (9, None, 100, False), (9, None, 0, True)],
)
def test_a_usage_without_input_or_without_an_expected_output_count_is_not_credible(
    input_tokens: int, output_tokens: int | None, output_tokens_max: int, credible: bool
) -> None:
    assert parser(output_tokens_max).is_credible(input_tokens, output_tokens) == credible


def test_a_usage_becomes_credible_when_the_missing_count_is_reported() -> None:
    made = parser()
    made.merge({"in": 9})
    assert made.usage is None
    made.merge({"out": 0})
    assert made.usage == Usage(9, 0)
