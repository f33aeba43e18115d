"""The shapes of the HTTP interface: what requests are checked by, and what OpenAPI says of answers."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, RootModel, WithJsonSchema

from ktrdr_budget.models import TTL_DEFAULT_S, TTL_MAX_S, OnExpiry
from ktrdr_budget.money import not_an_amount

__all__ = [
    "AgentBudgetOut",
    "BudgetList",
    "BudgetOut",
    "CommitIn",
    "DeniedProblem",
    "ExtendIn",
    "GrowIn",
    "HoldsPage",
    "HoldsQuery",
    "InvalidProblem",
    "LedgerPage",
    "LedgerQuery",
    "LimitIn",
    "Nothing",
    "Problem",
    "Readiness",
    "ReservationIn",
    "ReservationOut",
    "SettlementOut",
    "SpendIn",
    "UnavailableProblem",
    "UnreadyProblem",
]

BUDGETS_MAX = 64
PAGE_MAX = 1000
LABEL_CHARACTERS_MAX = 256
NAME = r"[A-Za-z0-9._:/@-]{1,128}"
_NAME = re.compile(NAME, re.ASCII)
_DECIMAL = re.compile(r"[0-9]{1,16}(\.[0-9]{1,32})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


# -- values that come in -----------------------------------------------------------------------------------------------


def _amount(value: Any) -> Any:
    # Whether its budget can count it, the limiter decides.
    if isinstance(value, str):
        if _DECIMAL.fullmatch(value):
            return value
    elif isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return value
    raise ValueError(str(not_an_amount(value)))


def _name(value: Any) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise ValueError(f"must match {NAME}")


def _label(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LABEL_CHARACTERS_MAX:
        raise ValueError(f"must be a text of at most {LABEL_CHARACTERS_MAX} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be Unicode text, without lone surrogates") from None
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)) or not 1 <= value <= TTL_MAX_S:
        raise ValueError(f"must be a number of seconds from 1 to {TTL_MAX_S}")
    return float(value)


def _until(value: Any) -> Any:
    if value is None or value == "window":
        return value
    if isinstance(value, str) and _INSTANT.fullmatch(value):
        try:
            return datetime.fromisoformat(value.upper()).astimezone(UTC)
        except (ValueError, OverflowError):
            pass
    raise ValueError("must be 'window', or an instant with its offset such as 2026-11-23T18:00:00Z")


def _page_size(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,4}", value, re.ASCII) and 1 <= int(value) <= PAGE_MAX:
        return int(value)
    raise ValueError(f"must be a whole number from 1 to {PAGE_MAX}")


_AMOUNT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "pattern": f"^{_DECIMAL.pattern}$"},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 2**53},
    ],
    "description": "Dollars, rounded up to a billionth, or a whole count: a decimal string, or a number as it stands.",
    "examples": ["0.15"],
}
_AMOUNTS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "propertyNames": {"pattern": f"^{NAME}$"},
    "additionalProperties": _AMOUNT_SCHEMA,
    "minProperties": 1,
    "maxProperties": BUDGETS_MAX,
    "description": "An amount per budget.",
    "examples": [{"agent": "0.15"}],
}
_TTL_SCHEMA = {
    "type": "number",
    "minimum": 1,
    "maximum": TTL_MAX_S,
    "default": TTL_DEFAULT_S,
    "description": "Seconds until the hold expires unless it is extended.",
}
_UNTIL_SCHEMA = {
    "anyOf": [{"const": "window"}, {"type": "string", "format": "date-time"}, {"type": "null"}],
    "description": "The end of the current window, an instant, or for good.",
    "default": None,
}


def _amounts(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not 1 <= len(value) <= BUDGETS_MAX:
        raise ValueError(f"must be an object with an amount for each of 1 to {BUDGETS_MAX} budgets")
    for name, amount in value.items():
        _name(name)
        _amount(amount)
    return value


def _amount_or_amounts(value: Any) -> Any:
    return _amounts(value) if isinstance(value, dict) else _amount(value)


def _name_schema(what: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^{NAME}$", "description": what, "examples": [example]})


Amounts = Annotated[dict[str, Any], PlainValidator(_amounts), WithJsonSchema(_AMOUNTS_SCHEMA)]
AmountOrAmounts = Annotated[
    Any, PlainValidator(_amount_or_amounts), WithJsonSchema({"anyOf": [*_AMOUNT_SCHEMA["anyOf"], _AMOUNTS_SCHEMA]})
]
HoldId = Annotated[
    str, PlainValidator(_name), _name_schema("Makes a retry harmless; made up if there is none.", "op_1")
]
Ttl = Annotated[float, PlainValidator(_seconds), WithJsonSchema(_TTL_SCHEMA)]
Label = Annotated[
    str,
    PlainValidator(_label),
    WithJsonSchema({"type": "string", "maxLength": LABEL_CHARACTERS_MAX, "description": "A label for the ledger."}),
]


# -- requests ----------------------------------------------------------------------------------------------------------


def _shape(**example: Any) -> ConfigDict:
    """A model that takes nothing but its fields, with an example."""
    return ConfigDict(extra="forbid", json_schema_extra={"examples": [example]} if example else None)


class _Request(BaseModel):
    model_config = _shape()


class Nothing(_Request):
    """A request that says all in its path."""


class ReservationIn(_Request):
    """What to hold: all amounts are granted, or none."""

    model_config = _shape(amounts={"agent": "0.15"}, id="op_1", ttl=900, on_expiry="charge", operation="research")
    amounts: Amounts
    id: HoldId | None = None
    ttl: Ttl = TTL_DEFAULT_S
    on_expiry: OnExpiry = Field(
        "charge", description="What an expired hold counts: all of it, what was reported, or nothing."
    )
    operation: Label = ""


class SpendIn(_Request):
    """Spend without a reservation."""

    model_config = _shape(amounts={"agent": "0.02"}, id="op_2", operation="research")
    amounts: Amounts
    id: HoldId | None = None
    operation: Label = ""


class CommitIn(_Request):
    """What it really cost; what was reported, if nothing is said.

    A scalar is for every budget in dollars; counts then commit what was reserved. An object says it per budget; what
    it leaves out is 0.
    """

    model_config = _shape(amounts="0.07")
    amounts: AmountOrAmounts | None = None


class ExtendIn(_Request):
    """A heartbeat: a new deadline, and the total of what was used so far."""

    model_config = _shape(ttl=900, accrued="0.03")
    ttl: Ttl | None = Field(None, description="Seconds from now; if none, at least 900, and no hold is cut short.")
    accrued: AmountOrAmounts | None = None


class GrowIn(_Request):
    """New totals of the reservation, so that a retry is harmless."""

    model_config = _shape(amounts={"agent": "0.25"})
    amounts: Amounts


class LimitIn(_Request):
    """A limit for all replicas; ``null`` is unlimited."""

    model_config = _shape(limit="10.00", until="window")
    limit: Annotated[Any, PlainValidator(lambda value: None if value is None else _amount(value))] = Field(
        json_schema_extra={"anyOf": [*_AMOUNT_SCHEMA["anyOf"], {"type": "null"}], "examples": ["10.00"]}
    )
    until: Annotated[Any, PlainValidator(_until), WithJsonSchema(_UNTIL_SCHEMA)] = None


class HoldsQuery(BaseModel):
    """Which page of holds."""

    limit: Annotated[
        int,
        PlainValidator(_page_size),
        WithJsonSchema({"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": 100}),
    ] = 100
    cursor: Annotated[str | None, Field(description="Where a page begins: the `next_cursor` of the one before.")] = None


class LedgerQuery(HoldsQuery):
    """Which page of a ledger."""

    window: Annotated[
        str | None, Field(description="A window by name, such as 2026-11-23; the current one if none.")
    ] = None


# -- answers -----------------------------------------------------------------------------------------------------------


class _Answer(BaseModel):
    model_config = _shape()


Instant = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
AmountOut = Annotated[
    str | int,
    WithJsonSchema(
        {
            "anyOf": [{"type": "string", "pattern": r"^-?[0-9]+\.[0-9]{2,9}$"}, {"type": "integer"}],
            "description": "Dollars as a decimal string; a count as an integer.",
            "examples": ["0.15"],
        }
    ),
]
AmountsOut = dict[str, AmountOut]
State = Literal["open", "unconfirmed", "committed", "released", "recorded"]


class AgentBudgetOut(_Answer):
    """The agent's daily budget, in JSON numbers."""

    model_config = _shape(
        date="2026-11-23",
        daily_limit=5.0,
        today_spend=0.15,
        remaining=4.85,
        cycles_affordable=32,
        spend_events=1,
        held=0.0,
        unconfirmed=0.0,
        resets_at="2026-11-24T00:00:00Z",
    )
    date: str
    daily_limit: float | None
    today_spend: float
    remaining: float | None
    cycles_affordable: int | None
    spend_events: int
    held: float
    unconfirmed: float
    resets_at: Instant | None
    recovering_until: Instant | None = Field(
        default=None, description="There only after the store has lost writes: until then, nothing is admitted."
    )


class BudgetOut(_Answer):
    """A budget's window now; `null` limits are unlimited."""

    model_config = _shape(
        name="agent",
        unit="usd",
        kind="spend",
        period="day",
        timezone="UTC",
        window="2026-11-23",
        starts_at="2026-11-23T00:00:00Z",
        resets_at="2026-11-24T00:00:00Z",
        limit="10.00",
        spent="0.15",
        held="0.00",
        unconfirmed="0.00",
        remaining="9.85",
        spend_events=1,
        overruns=0,
        limit_source="runtime",
        limit_until="2026-11-24T00:00:00Z",
        configured_limit="5.00",
        as_of="2026-11-23T12:00:00.125Z",
        recovering_until=None,
    )
    name: str
    unit: str
    kind: Literal["spend", "slots"]
    period: Literal["hour", "day", "week", "month", "ever"]
    timezone: str
    window: str
    starts_at: Instant | None
    resets_at: Instant | None
    limit: AmountOut | None
    spent: AmountOut
    held: AmountOut
    unconfirmed: AmountOut
    remaining: AmountOut | None
    spend_events: int
    overruns: int
    limit_source: Literal["configured", "runtime"]
    limit_until: Instant | None
    configured_limit: AmountOut | None
    as_of: Instant
    recovering_until: Instant | None = Field(
        default=None,
        description="Set after the store has lost writes: replicas tell it again what it lost; nothing is admitted.",
    )


class MigrationOut(_Answer):
    """Which definition of a budget was registered, and which one is now."""

    model_config = _shape(
        budget="agent",
        before="unit usd, period week, timezone UTC, kind spend",
        after="unit usd, period day, timezone UTC, kind spend",
        limit_cleared=False,
    )
    budget: str
    before: str | None = Field(description="`null` if none was registered.")
    after: str
    limit_cleared: bool = Field(description="Whether a run-time limit went, as it was an amount of another unit.")


class UnavailableBudget(_Answer):
    """A budget whose figures are unknown."""

    budget: str
    detail: str = Field(description="Why they are unknown.")


class BudgetList(_Answer):
    """Every budget."""

    budgets: list[BudgetOut]
    unavailable: list[UnavailableBudget] = Field(
        description="Budgets whose figures are unknown, such as one of which "
        "another definition is registered in the store."
    )


class ReservationOut(_Answer):
    """A hold."""

    model_config = _shape(
        id="op_1",
        state="open",
        amounts={"agent": "0.15"},
        accrued={"agent": "0.00"},
        charged={"agent": "0.00"},
        windows={"agent": "2026-11-23"},
        on_expiry="charge",
        created_at="2026-11-23T12:00:00Z",
        expires_at="2026-11-23T12:15:00Z",
        operation="research",
        replayed=False,
    )
    id: str
    state: State
    amounts: AmountsOut
    accrued: AmountsOut
    charged: AmountsOut
    windows: dict[str, str]
    on_expiry: OnExpiry
    created_at: Instant
    expires_at: Instant
    operation: str
    replayed: bool


class HoldsPage(_Answer):
    """Open, then unconfirmed holds, newest deadline first."""

    holds: list[ReservationOut]
    next_cursor: str | None


class LedgerEntryOut(_Answer):
    """One signed line; they add up to spent + unconfirmed."""

    entry_id: Annotated[
        str, Field(description="Its number in the ledger, from 1; empty for the summary of trimmed ones.")
    ]
    at: Instant
    kind: Literal["commit", "record", "expiry", "correction", "release", "revival", "carried", "repair", "audit"]
    hold_id: str
    amount: AmountOut
    operation: str
    trace_id: str


class LedgerPage(_Answer):
    """Entries of a window, newest first."""

    entries: list[LedgerEntryOut]
    next_cursor: str | None
    trimmed: Annotated[
        bool,
        Field(
            description="Whether the entries at `cursor` were trimmed meanwhile, so that this is the first page again."
        ),
    ]


class SettlementOut(_Answer):
    """What a commit, release or record did."""

    model_config = _shape(
        id="op_1", state="committed", amounts={"agent": "0.07"}, replayed=False, overrun=False, late=False
    )
    id: str
    state: Literal["committed", "released", "recorded"]
    amounts: AmountsOut
    replayed: bool
    overrun: bool
    late: bool


class Liveness(_Answer):
    """The process answers."""

    status: Literal["alive"]


class Readiness(_Answer):
    """The store can be relied on."""

    status: Literal["ready"]
    checks: dict[Literal["store", "policy", "scripts"], Literal["ok"]]


# -- problems ----------------------------------------------------------------------------------------------------------


class Problem(BaseModel):
    """An error, as RFC 9457 writes it."""

    type: str = Field(examples=["urn:ktrdr-budget:problem:unknown-budget"])
    title: str
    status: int
    detail: str
    code: str = Field(description="A stable name for programs.", examples=["unknown-budget"])


class ErrorOut(BaseModel):
    """One thing that is wrong with a request."""

    loc: list[str | int]
    msg: str
    type: str


class InvalidProblem(Problem):
    """A request that is not valid; `errors` says where, if its shape is."""

    errors: list[ErrorOut] | None = None


class DeniedProblem(Problem):
    """A budget has no room; nothing was written."""

    budget: str
    unit: str
    reason: Literal["exceeds_limit", "budget_held", "budget_exhausted"]
    limit: AmountOut
    spent: AmountOut
    held: AmountOut
    unconfirmed: AmountOut
    remaining: AmountOut
    requested: AmountOut
    fits: AmountOut = Field(description="The largest amount that would have been granted.")
    retry_after: int | None = Field(description="Seconds until trying again can help; `null` if waiting cannot help.")


class CrowdedProblem(Problem):
    """The tenant has as many holds, or budgets, as it may; nothing was written."""

    reason: Literal["too_many_holds", "too_many_budgets"]
    retry_after: int | None = Field(description="Seconds until the first open hold expires; `null` if none is open.")


class RefusedProblem(RootModel[DeniedProblem | CrowdedProblem]):
    """A budget has no room, or the tenant has too many holds or budgets; nothing was written."""


class UnavailableProblem(Problem):
    """The store cannot be reached."""

    ambiguous: bool = Field(description="Whether it may have been done all the same; repeating it with its id is safe.")


class UnreadyProblem(Problem):
    """What keeps the store from being relied on."""

    checks: dict[Literal["store", "policy", "scripts"], str]
