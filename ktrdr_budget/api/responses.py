"""The JSON that goes out: money as decimal strings, counts as integers, instants as RFC 3339 in UTC.

Documents are built by hand, for a model would be checked a second time on its way out; the tests hold them against the
models of :mod:`~ktrdr_budget.api.schemas`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from starlette.responses import Response

from ktrdr_budget.limiter import AsyncHold
from ktrdr_budget.models import HoldView, LedgerEntry, Settlement, Status
from ktrdr_budget.money import Amount, from_units
from ktrdr_budget.periods import from_ms

__all__ = [
    "JsonResponse",
    "agent_budget",
    "amount_json",
    "budget",
    "granted",
    "ledger_entry",
    "reservation",
    "settlement",
]

EMPTY = '""'
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class JsonResponse(Response):
    """A JSON document, with as few steps as can be: it answers the busiest routes."""

    def __init__(
        self,
        document: Mapping[str, Any] | str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: bytes = b"application/json",
    ) -> None:
        self.status_code = status
        self.background = None
        self.body = (document if isinstance(document, str) else _encode(document)).encode()
        self.raw_headers = [(b"content-length", b"%d" % len(self.body)), (b"content-type", media_type)]
        if headers:
            self.raw_headers += [(name.lower().encode(), value.encode()) for name, value in headers.items()]


# -- values ------------------------------------------------------------------------------------------------------------


def amount_json(amount: Amount | None) -> str | int | None:
    """A decimal string for money, never in scientific notation; an integer for a count; ``None`` for uncapped."""
    return amount if amount is None or isinstance(amount, int) else f"{amount:f}"


def amounts_json(amounts: Mapping[str, Amount]) -> dict[str, str | int]:
    """Per budget."""
    return {name: amount if isinstance(amount, int) else f"{amount:f}" for name, amount in amounts.items()}


def instant_json(instant: datetime) -> str:
    """``2026-11-23T12:00:00Z``, with milliseconds where there are any."""
    return instant.isoformat(timespec="milliseconds" if instant.microsecond else "seconds")[:-6] + "Z"


def _instant(instant: datetime | None) -> str | None:
    return None if instant is None else instant_json(instant)


# -- reservations ------------------------------------------------------------------------------------------------------


def granted(hold: AsyncHold, on_expiry: str, operation: str) -> str:
    """A hold that was reserved just now, as JSON.

    What :func:`reservation` tells, written out: this answers the busiest route. Ids, names, windows and amounts have no
    character that JSON would escape.
    """
    amounts, nothing, windows = [], [], []
    for window, units in hold.parts:
        name = window.budget
        amounts.append(f'"{name}":{_units_json(units, window.unit)}')
        nothing.append(f'"{name}":{_units_json(0, window.unit)}')
        windows.append(f'"{name}":"{window.span.name}"')
    zeros = ",".join(nothing)
    expires_ms, ttl_ms = hold.deadline_ms, round(hold.ttl * 1000)
    return (
        f'{{"id":"{hold.id}","state":"open","amounts":{{{",".join(amounts)}}},"accrued":{{{zeros}}},'
        f'"charged":{{{zeros}}},"windows":{{{",".join(windows)}}},"on_expiry":"{on_expiry}",'
        f'"created_at":"{_ms_json(expires_ms - ttl_ms)}","expires_at":"{_ms_json(expires_ms)}",'
        f'"operation":{_encode(operation) if operation else EMPTY},"replayed":false}}'
    )


@lru_cache(maxsize=4096)
def _units_json(units: int, unit: str) -> str:
    return _encode(amount_json(from_units(units, unit)))


@lru_cache(maxsize=256)
def _second_json(second: int) -> str:
    return f"{from_ms(second * 1000):%Y-%m-%dT%H:%M:%S}"


def _ms_json(instant_ms: int) -> str:
    second, milliseconds = divmod(instant_ms, 1000)
    return f"{_second_json(second)}.{milliseconds:03d}Z" if milliseconds else f"{_second_json(second)}Z"


def reservation(hold: HoldView, *, replayed: bool = False) -> dict[str, Any]:
    """A hold as the store knows it."""
    return {
        "id": hold.id,
        "state": hold.state,
        "amounts": amounts_json(hold.amounts),
        "accrued": amounts_json(hold.accrued),
        "charged": amounts_json(hold.charged),
        "windows": dict(hold.windows),
        "on_expiry": hold.on_expiry,
        "created_at": instant_json(hold.created_at),
        "expires_at": instant_json(hold.expires_at),
        "operation": hold.operation,
        "replayed": replayed,
    }


def settlement(done: Settlement) -> dict[str, Any]:
    """What a commit, release or record did."""
    return {
        "id": done.id,
        "state": done.state,
        "amounts": amounts_json(done.amounts),
        "replayed": done.replayed,
        "overrun": done.overrun,
        "late": done.late,
    }


# -- budgets -----------------------------------------------------------------------------------------------------------


def budget(status: Status) -> dict[str, Any]:
    """A budget's window now."""
    return {
        "name": status.budget,
        "unit": status.unit,
        "kind": status.kind,
        "period": status.period,
        "timezone": status.timezone,
        "window": status.window,
        "starts_at": _instant(status.starts_at),
        "resets_at": _instant(status.resets_at),
        "limit": amount_json(status.limit),
        "spent": amount_json(status.spent),
        "held": amount_json(status.held),
        "unconfirmed": amount_json(status.unconfirmed),
        "remaining": amount_json(status.remaining),
        "spend_events": status.events,
        "overruns": status.overruns,
        "limit_source": status.limit_source,
        "limit_until": _instant(status.limit_until),
        "configured_limit": amount_json(status.configured_limit),
        "as_of": instant_json(status.as_of),
        "recovering_until": _instant(status.recovering_until),
    }


def agent_budget(status: Status, cycle_estimate: Amount) -> str:
    """The agent's daily budget in JSON numbers, as JSON: what dashboards and scripts of such backends already read."""
    remaining = status.remaining
    members = {
        "date": _encode(status.window),
        "daily_limit": _number_json(status.limit),
        "today_spend": _number_json(status.spent),
        "remaining": _number_json(remaining),
        "cycles_affordable": "null" if remaining is None else str(int(remaining // cycle_estimate)),
        "spend_events": str(status.events),
        "held": _number_json(status.held),
        "unconfirmed": _number_json(status.unconfirmed),
        "resets_at": _encode(_instant(status.resets_at)),
    }
    if status.recovering_until is not None:
        members["recovering_until"] = _encode(_instant(status.recovering_until))
    return "{" + ",".join(f'"{name}":{value}' for name, value in members.items()) + "}"


def _number_json(amount: Amount | None) -> str:
    """Dollars as a JSON number, never in scientific notation, which ``float`` shows below 0.0001."""
    if amount is None:
        return "null"
    number = repr(float(amount))
    return f"{amount:f}" if "e" in number else number


def ledger_entry(entry: LedgerEntry) -> dict[str, Any]:
    """One signed line of a ledger."""
    return {
        "entry_id": entry.entry_id,
        "at": instant_json(entry.at),
        "kind": entry.kind,
        "hold_id": entry.hold_id,
        "amount": amount_json(entry.amount),
        "operation": entry.operation,
        "trace_id": entry.trace_id,
    }
