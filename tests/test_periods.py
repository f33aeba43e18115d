"""Windows of a period in a timezone."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget import InvalidArgument
from ktrdr_budget.periods import from_ms, to_ms, window_at, window_named

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/Sao_Paulo",
    "Asia/Kathmandu",
    "Pacific/Apia",
    "Africa/Cairo",
    "America/Havana",
]
INSTANTS = st.integers(to_ms(datetime(2000, 1, 1, tzinfo=UTC)), to_ms(datetime(2100, 1, 1, tzinfo=UTC)))


def at(text: str) -> int:
    return to_ms(datetime.fromisoformat(text))


@pytest.mark.parametrize(
    ("period", "name", "start", "end"),
    [
        ("hour", "2026-11-23T12Z", "2026-11-23T12:00Z", "2026-11-23T13:00Z"),
        ("day", "2026-11-23", "2026-11-23T00:00+01:00", "2026-11-24T00:00+01:00"),
        ("week", "2026-W48", "2026-11-23T00:00+01:00", "2026-11-30T00:00+01:00"),
        ("month", "2026-11", "2026-11-01T00:00+01:00", "2026-12-01T00:00+01:00"),
    ],
)
def test_a_window_of_each_period_has_the_expected_name_and_bounds(period, name, start, end):
    span = window_at(period, "Europe/Berlin", at("2026-11-23T12:34:56.789Z"))
    assert (span.name, span.start_ms, span.end_ms) == (name, at(start), at(end))


def test_the_window_of_the_period_named_ever_has_no_end():
    span = window_at("ever", "UTC", 0)
    assert (span.name, span.end_ms, span.resets_at) == ("ever", None, None)


@pytest.mark.parametrize(
    ("zone", "noon", "hours"),
    [
        ("Europe/Berlin", "2026-03-29T12:00+02:00", 23),
        ("Europe/Berlin", "2026-10-25T12:00+01:00", 25),
        ("America/Sao_Paulo", "2018-11-04T12:00-02:00", 23),  # clocks skip midnight
        ("America/Havana", "2024-11-03T12:00-05:00", 25),  # clocks repeat midnight
        ("Australia/Lord_Howe", "2026-10-04T12:00+11:00", 23.5),
    ],
)
def test_a_day_on_which_clocks_change_is_shorter_or_longer_than_24_hours(zone, noon, hours):
    span = window_at("day", zone, at(noon))
    assert span.end_ms is not None
    assert (span.end_ms - span.start_ms) / 3_600_000 == hours


def test_an_hour_repeated_by_a_clock_change_is_two_windows():
    first = window_at("hour", "Europe/Berlin", at("2026-10-25T02:30+02:00"))
    second = window_at("hour", "Europe/Berlin", at("2026-10-25T02:30+01:00"))
    assert (first.name, second.name) == ("2026-10-25T00Z", "2026-10-25T01Z")


def test_a_day_skipped_by_a_country_has_no_window():
    before = window_at("day", "Pacific/Apia", at("2011-12-30T09:59:59Z"))
    after = window_at("day", "Pacific/Apia", at("2011-12-30T10:00:00Z"))
    assert (before.name, after.name) == ("2011-12-29", "2011-12-31")


@given(st.sampled_from(["hour", "day", "week", "month"]), st.sampled_from(ZONES), INSTANTS)
def test_each_instant_is_in_exactly_one_window_and_a_window_is_found_by_name(period, zone, now_ms):
    span = window_at(period, zone, now_ms)
    assert span.contains(now_ms)
    assert span.end_ms is not None
    following = window_at(period, zone, span.end_ms)
    assert following.start_ms == span.end_ms
    assert following.name != span.name
    assert window_at(period, zone, span.end_ms - 1) == span
    assert window_named(period, zone, span.name) == span


@pytest.mark.parametrize(
    ("period", "name"),
    [
        ("day", "2026-13-01"),
        ("day", "ever"),
        ("day", "2026-1-1"),
        ("week", "2026-W54"),
        ("hour", "2026-11-23"),
        ("ever", "x"),
    ],
)
def test_an_invalid_window_name_is_rejected(period, name):
    with pytest.raises(InvalidArgument):
        window_named(period, "UTC", name)


def test_instants_are_converted_exactly_except_that_microseconds_are_rounded_up():
    assert from_ms(at("2026-11-23T12:34:56.789Z")) == datetime(2026, 11, 23, 12, 34, 56, 789_000, tzinfo=UTC)
    assert to_ms(datetime(2026, 11, 23, 0, 0, 0, 1, tzinfo=UTC)) == at("2026-11-23T00:00Z") + 1  # rounded up
