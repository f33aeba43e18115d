"""Windows: the intervals to which a budget's spend belongs.

The name of a window is part of the window's key. A new day has a new key, so no job has to reset counters. This module
computes names and bounds from an IANA timezone, and the store checks the bounds against its clock. Hours are named by
their start in UTC. So when clocks go back, the hour that occurs twice gives two windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

from ktrdr_budget.errors import InvalidArgument, shown

__all__ = ["PERIODS", "Span", "timezone_of", "window_at", "window_named"]

PERIODS = ("hour", "day", "week", "month", "ever")


@dataclass(frozen=True, slots=True)
class Span:
    """A window: its name, and its half-open bounds in milliseconds since the epoch (UTC).

    ``end_ms`` is ``None`` for ``ever``.
    """

    name: str
    start_ms: int
    end_ms: int | None

    def contains(self, now_ms: int) -> bool:
        """Whether the instant lies in the window."""
        return self.start_ms <= now_ms and (self.end_ms is None or now_ms < self.end_ms)

    @property
    def resets_at(self) -> datetime | None:
        """The end, as an aware UTC datetime; ``None`` for ``ever``."""
        return None if self.end_ms is None else from_ms(self.end_ms)


def from_ms(instant_ms: int) -> datetime:
    """Convert milliseconds since the epoch to an aware UTC datetime."""
    return datetime.fromtimestamp(instant_ms // 1000, UTC) + timedelta(milliseconds=instant_ms % 1000)


def to_ms(instant: datetime) -> int:
    """Convert an aware datetime to milliseconds since the epoch, rounded up."""
    delta = instant - datetime(1970, 1, 1, tzinfo=UTC)
    return -(-(delta // timedelta(microseconds=1)) // 1000)


def timezone_of(name: str) -> tzinfo:
    """Return the IANA timezone of this name.

    Raises:
        InvalidArgument: the timezone is unknown on this machine.
    """
    if not isinstance(name, str):
        raise InvalidArgument(f"unknown timezone: {shown(name)}; use an IANA name such as Europe/Berlin")
    return _timezone(name)


@lru_cache(maxsize=256)
def _timezone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError):
        raise InvalidArgument(f"unknown timezone: {shown(name)}; use an IANA name such as Europe/Berlin") from None


def window_at(period: str, timezone: str, now_ms: int) -> Span:
    """Return the window of ``period`` in ``timezone`` that contains the instant ``now_ms``."""
    if period == "ever":
        return Span("ever", 0, None)
    if period == "hour":
        return _hour(now_ms)
    zone = timezone_of(timezone)
    local = from_ms(now_ms).astimezone(zone)
    midnight = datetime(local.year, local.month, local.day)
    return _local_window(period, zone, midnight)


def window_named(period: str, timezone: str, name: str) -> Span:
    """Return the window of ``period`` with this name, such as ``2026-11-23`` for a day.

    Raises:
        InvalidArgument: the period has no window of this name.
    """
    if not isinstance(name, str):
        raise InvalidArgument(f"not a window of period {period!r}: {shown(name)}")
    try:
        if period == "ever" and name == "ever":
            return Span("ever", 0, None)
        if period == "hour":
            span = _hour(to_ms(datetime.strptime(name, "%Y-%m-%dT%HZ").replace(tzinfo=UTC)))
        else:
            day = {"day": name, "month": f"{name}-01"}.get(period)
            start = datetime.strptime(day, "%Y-%m-%d") if day else datetime.strptime(f"{name}-1", "%G-W%V-%u")
            span = _local_window(period, timezone_of(timezone), start)
        if span.name == name:
            return span
    except (ValueError, OverflowError):
        pass
    raise InvalidArgument(f"not a window of period {period!r}: {shown(name)}")


def _hour(now_ms: int) -> Span:
    start_ms = now_ms - now_ms % 3_600_000
    return Span(f"{from_ms(start_ms):%Y-%m-%dT%HZ}", start_ms, start_ms + 3_600_000)


def _local_window(period: str, zone: tzinfo, midnight: datetime) -> Span:
    """Return the day, week (ISO, from Monday) or month that contains a local midnight.

    Args:
        midnight: the local midnight, as a datetime without a timezone.
    """
    if period == "day":
        start, end, name = midnight, midnight + timedelta(days=1), f"{midnight:%Y-%m-%d}"
    elif period == "week":
        start = midnight - timedelta(days=midnight.weekday())
        end, name = start + timedelta(days=7), f"{start:%G-W%V}"
    else:
        start = midnight.replace(day=1)
        end = (start + timedelta(days=32)).replace(day=1)
        name = f"{start:%Y-%m}"
    return Span(name, _first_instant_ms(start, zone), _first_instant_ms(end, zone))


def _first_instant_ms(local: datetime, zone: tzinfo) -> int:
    """Return the first instant of the local day ``local``.

    If midnight occurs twice, the day begins at the first occurrence, which ``fold=0`` selects. If clocks skip midnight,
    local time has a gap, and the day begins at the end of the gap. For a skipped midnight, Python uses the offset
    before the gap. This gives an instant after the gap, so the result is moved back to the end of the gap.
    """
    instant = local.replace(tzinfo=zone, fold=0)
    utc = instant.astimezone(UTC)
    if utc.astimezone(zone).replace(tzinfo=None) == local:
        return to_ms(utc)
    return _end_of_gap_ms(utc, zone)


def _end_of_gap_ms(inside: datetime, zone: tzinfo) -> int:
    """Find the end of a gap in local time by bisection, with a precision of one second.

    Args:
        inside: the instant after the gap that Python gives for a local time inside the gap.
    """
    low, high = to_ms(inside - timedelta(days=1)) // 1000, to_ms(inside) // 1000
    after = from_ms(high * 1000).astimezone(zone).utcoffset()
    while high - low > 1:
        middle = (low + high) // 2
        if from_ms(middle * 1000).astimezone(zone).utcoffset() == after:
            high = middle
        else:
            low = middle
    return high * 1000
