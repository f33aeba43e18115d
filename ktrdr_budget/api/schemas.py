"""The Pydantic models of requests and responses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    RootModel,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ktrdr_budget.models import TTL_DEFAULT_S, TTL_MAX_S, OnExpiry, Rights
from ktrdr_budget.money import Amount, not_an_amount

__all__ = [
    "AccessKeyOut",
    "AgentBudgetOut",
    "BudgetList",
    "BudgetName",
    "BudgetOut",
    "ChangesPage",
    "CommitIn",
    "DeniedProblem",
    "ExtendIn",
    "GrowIn",
    "HoldId",
    "HoldsPage",
    "InvalidJSON",
    "InvalidProblem",
    "KeyIn",
    "KeyName",
    "KeysPage",
    "LedgerPage",
    "LedgerQuery",
    "LimitIn",
    "Liveness",
    "MigrationOut",
    "NewKeyOut",
    "PageQuery",
    "Problem",
    "Readiness",
    "ReasonQuery",
    "RefusedProblem",
    "ReservationIn",
    "ReservationOut",
    "RevokedKeyOut",
    "SettlementOut",
    "SpendIn",
    "UnavailableBudget",
    "UnavailableProblem",
    "UnreadyProblem",
    "amount_json",
    "instant_json",
]

BUDGETS_MAX = 64
PAGE_MAX = 1000
LABEL_CHARACTERS_MAX = 256
NAME = r"[A-Za-z0-9._:/@-]{1,128}"
_NAME = re.compile(NAME, re.ASCII)
_DECIMAL = re.compile(r"[0-9]{1,16}(\.[0-9]{1,32})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


# -- values of requests -----------------------------------------------------------------------------------------------


def _amount(value: Any) -> Any:
    # The limiter checks it against the budget's unit.
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
        raise ValueError(f"must be a string of at most {LABEL_CHARACTERS_MAX} characters")
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
    "description": "Dollars, rounded up to a nano-dollar, or a whole count; a decimal string or an exact JSON number.",
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
    "description": "Seconds until the hold expires, if no heartbeat extends the hold.",
}
_UNTIL_SCHEMA = {
    "anyOf": [{"const": "window"}, {"type": "string", "format": "date-time"}, {"type": "null"}],
    "description": "When the limit ends: `window` (with the current window), an instant, or `null` (never).",
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


Amounts = Annotated[dict[str, Any], PlainValidator(_amounts), WithJsonSchema(_AMOUNTS_SCHEMA)]
AmountOrAmounts = Annotated[
    Any, PlainValidator(_amount_or_amounts), WithJsonSchema({"anyOf": [*_AMOUNT_SCHEMA["anyOf"], _AMOUNTS_SCHEMA]})
]
NewHoldId = Annotated[
    str,
    PlainValidator(_name),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": f"^{NAME}$",
            "description": "The id of the hold or the spend, and idempotency key. Default: generated.",
            "examples": ["op_1"],
        }
    ),
]
Ttl = Annotated[float, PlainValidator(_seconds), WithJsonSchema(_TTL_SCHEMA)]
Label = Annotated[
    str,
    PlainValidator(_label),
    WithJsonSchema(
        {
            "type": "string",
            "maxLength": LABEL_CHARACTERS_MAX,
            "description": "A label of the hold or the spend in the ledger.",
        }
    ),
]

Reason = Annotated[
    str,
    PlainValidator(_label),
    WithJsonSchema(
        {
            "type": "string",
            "maxLength": LABEL_CHARACTERS_MAX,
            "description": "Why, for the log of changes.",
        }
    ),
]


_PATH_NAME = Path(description="A name or id, with each `/` sent as `%2F`.", json_schema_extra={"pattern": f"^{NAME}$"})
BudgetName = Annotated[str, _PATH_NAME]
HoldId = Annotated[str, _PATH_NAME]
KeyName = Annotated[str, _PATH_NAME]


# -- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InvalidJSON:
    """The reason why a body is not JSON."""

    reason: str


def closed(**example: Any) -> ConfigDict:
    """Configure a Pydantic model: extra fields are forbidden, and the arguments are the example in OpenAPI."""
    return ConfigDict(
        extra="forbid",
        from_attributes=True,
        json_schema_serialization_defaults_required=True,
        json_schema_extra={"examples": [example]} if example else None,
    )


class RequestModel(BaseModel):
    """The body of a request."""

    model_config = closed()

    @model_validator(mode="before")
    @classmethod
    def _require_json(cls, document: Any) -> Any:
        if isinstance(document, InvalidJSON):
            raise PydanticCustomError("json_invalid", "not JSON: {reason}", {"reason": document.reason})
        if isinstance(document, bytes):  # FastAPI parses no other media type
            raise PydanticCustomError("content_type", "the body must be sent as Content-Type: application/json")
        return document


class ReservationIn(RequestModel):
    """The amounts to reserve. Either all are granted, or none is."""

    model_config = closed(amounts={"agent": "0.15"}, id="op_1", ttl=900, on_expiry="charge", operation="research")
    amounts: Amounts
    id: NewHoldId | None = None
    ttl: Ttl = TTL_DEFAULT_S
    on_expiry: OnExpiry = Field(
        "charge",
        description="What counts as unconfirmed after the hold expires: the whole amount (`charge`), the accrued "
        "amount, or nothing (`release`).",
    )
    operation: Label = ""


class SpendIn(RequestModel):
    """Spend without a reservation."""

    model_config = closed(amounts={"agent": "0.02"}, id="op_2", operation="research")
    amounts: Amounts
    id: NewHoldId | None = None
    operation: Label = ""


class CommitIn(RequestModel):
    """The actual cost. Default: the accrued amounts.

    A scalar is committed for each budget in dollars; for every other budget, the reserved amount is committed. An
    object has an amount per budget; for a budget that is not in the object, 0 is committed.
    """

    model_config = closed(amounts="0.07")
    amounts: AmountOrAmounts | None = None


class ExtendIn(RequestModel):
    """A heartbeat: a new deadline, and the total cost so far."""

    model_config = closed(ttl=900, accrued="0.03")
    ttl: Ttl | None = Field(
        None, description="Seconds from now to the new deadline. Default: 900. The deadline never becomes earlier."
    )
    accrued: AmountOrAmounts | None = None


class GrowIn(RequestModel):
    """The new totals of the reserved amounts. Because they are totals, a retry is harmless."""

    model_config = closed(amounts={"agent": "0.25"})
    amounts: Amounts


class LimitIn(RequestModel):
    """A limit for all replicas; ``null`` means unlimited."""

    model_config = closed(limit="10.00", until="window", reason="a long backtest")
    limit: Annotated[Any, PlainValidator(lambda value: None if value is None else _amount(value))] = Field(
        json_schema_extra={"anyOf": [*_AMOUNT_SCHEMA["anyOf"], {"type": "null"}], "examples": ["10.00"]}
    )
    until: Annotated[Any, PlainValidator(_until), WithJsonSchema(_UNTIL_SCHEMA)] = None
    reason: Reason = ""


class KeyIn(RequestModel):
    """A new access key."""

    model_config = closed(
        name="ci", scope={"team": "quant"}, may_set=["user"], rights="use", expires="90d", reason="the nightly build"
    )
    name: Annotated[
        str,
        PlainValidator(_name),
        WithJsonSchema({"type": "string", "pattern": f"^{NAME}$", "description": "A name that no other key has."}),
    ]
    scope: dict[str, str] = Field(
        default={}, max_length=16, description="The scope of all requests with the key. Default: no scope."
    )
    may_set: list[str] = Field(
        default=[], max_length=16, description="The further fields of a scope that requests with the key may set."
    )
    rights: Rights = Field("use", description="`read`, `use` (reserve, settle, record, too) or `admin` (everything).")
    expires: str | None = Field(
        None, description="How long the key is valid: `90d`, `12h`, `30m`. Default: until it is revoked."
    )
    reason: Reason = ""


class ReasonQuery(BaseModel):
    """The reason of a change, for requests without a body."""

    reason: Reason = ""


class PageQuery(BaseModel):
    """The page of a list."""

    limit: Annotated[
        int,
        PlainValidator(_page_size),
        WithJsonSchema({"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": 100}),
    ] = 100
    cursor: Annotated[str | None, Field(description="The `next_cursor` of the previous page.")] = None


class LedgerQuery(PageQuery):
    """The page of a ledger."""

    window: Annotated[
        str | None, Field(description="The name of the window, such as 2026-11-23. Default: the current window.")
    ] = None


# -- responses ---------------------------------------------------------------------------------------------------------


class ResponseModel(BaseModel):
    """The body of a response."""

    model_config = closed()


def amount_json(amount: Amount) -> str | int:
    """A decimal string for money, never in scientific notation; an integer for a count."""
    return f"{amount:f}" if isinstance(amount, Decimal) else amount


def instant_json(instant: datetime) -> str:
    """``2026-11-23T12:00:00Z``, with milliseconds unless they are 0."""
    return instant.isoformat(timespec="milliseconds" if instant.microsecond else "seconds")[:-6] + "Z"


# Validators, not serializers: models of strings are written faster, and reservations are frequent.


def _amount_out(amount: Any) -> Any:
    return amount_json(amount) if isinstance(amount, Decimal) else amount


def _instant(instant: Any) -> Any:
    return instant_json(instant) if isinstance(instant, datetime) else instant


def _plain_number(amount: Amount) -> str:
    # ``float`` writes numbers below 0.0001 in scientific notation.
    number = repr(float(amount))
    return f"{amount:f}" if "e" in number else number


Instant = Annotated[str, BeforeValidator(_instant), WithJsonSchema({"type": "string", "format": "date-time"})]
PlainNumber = Annotated[Decimal | int, PlainSerializer(_plain_number), WithJsonSchema({"type": "number"})]
AmountOut = Annotated[
    str | int,
    BeforeValidator(_amount_out),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string", "pattern": r"^-?[0-9]+\.[0-9]{2,9}$"}, {"type": "integer"}],
            "description": "Dollars as a decimal string; a count as an integer.",
            "examples": ["0.15"],
        }
    ),
]
AmountsOut = dict[str, AmountOut]
Scope = Annotated[dict[str, str], Field(description="The fields of the scope of the hold; empty if it has none.")]
State = Literal["open", "unconfirmed", "committed", "released", "recorded"]


class AgentBudgetOut(ResponseModel):
    """The agent's daily budget, in JSON numbers."""

    model_config = closed(
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
    date: str = Field(validation_alias="window")
    daily_limit: PlainNumber | None = Field(validation_alias="limit")
    today_spend: PlainNumber = Field(validation_alias="spent")
    remaining: PlainNumber | None
    cycles_affordable: int | None = None
    spend_events: int = Field(validation_alias="events")
    held: PlainNumber
    unconfirmed: PlainNumber
    resets_at: Instant | None
    recovering_until: Instant | None = Field(
        default=None,
        exclude_if=lambda instant: instant is None,
        description="Present only after a data loss of the store: no reservation is granted before this instant.",
    )


class BudgetOut(ResponseModel):
    """The current window of a budget; a limit of `null` means unlimited."""

    model_config = closed(
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
        recovering_until="2026-11-23T12:01:00Z",
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
    spend_events: int = Field(validation_alias="events")
    overruns: int
    limit_source: Literal["configured", "runtime"]
    limit_until: Instant | None
    configured_limit: AmountOut | None
    as_of: Instant
    recovering_until: Instant | None = Field(
        default=None,
        description="Set after a data loss of the store: until this instant, replicas replay writes, and no "
        "reservation is granted.",
    )


class MigrationOut(ResponseModel):
    """The definition of a budget before and after the migration."""

    model_config = closed(
        budget="agent",
        before="unit usd, period week, timezone UTC, kind spend",
        after="unit usd, period day, timezone UTC, kind spend",
        limit_cleared=False,
    )
    budget: str
    before: str | None = Field(description="`null` if no definition was registered.")
    after: str
    limit_cleared: bool = Field(description="Whether a run-time limit was removed because the unit has changed.")


class UnavailableBudget(ResponseModel):
    """A budget whose figures are unknown."""

    budget: str
    detail: str = Field(description="The reason.")


class BudgetList(ResponseModel):
    """Every budget."""

    budgets: list[BudgetOut]
    unavailable: list[UnavailableBudget] = Field(
        description="Budgets whose figures are unknown, for example because another definition is registered."
    )


class ReservationOut(ResponseModel):
    """A hold."""

    model_config = closed(
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
        scope={},
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
    scope: Scope
    replayed: bool = Field(
        default=False,
        description="Whether the same reservation was granted before; if so, this request changed nothing.",
    )


class HoldsPage(ResponseModel):
    """Open holds, then unconfirmed holds. Both start with the latest deadline."""

    holds: list[ReservationOut] = Field(validation_alias="items")
    next_cursor: str | None


class LedgerEntryOut(ResponseModel):
    """A signed entry of a ledger. The sum of the entries of a window is spent + unconfirmed."""

    entry_id: str = Field(
        description="The number of the entry in the ledger, from 1; empty for the summary of trimmed entries."
    )
    at: Instant
    kind: Literal["commit", "record", "expiry", "correction", "release", "revival", "carried", "repair", "audit"]
    hold_id: str
    amount: AmountOut
    operation: str
    trace_id: str
    scope: Scope


class LedgerPage(ResponseModel):
    """Entries of a window, newest first."""

    entries: list[LedgerEntryOut] = Field(validation_alias="items")
    next_cursor: str | None
    trimmed: bool = Field(
        description="Whether the entries at `cursor` were trimmed; if so, this page is the first page again."
    )


class AccessKeyOut(ResponseModel):
    """An access key, without its secret."""

    name: str
    scope: dict[str, str]
    may_set: list[str]
    rights: Rights
    created_at: Instant
    expires_at: Instant | None


class KeysPage(ResponseModel):
    """Access keys, by name."""

    keys: list[AccessKeyOut] = Field(validation_alias="items")
    next_cursor: str | None


class NewKeyOut(AccessKeyOut):
    """A new access key, with its secret, which is shown only here."""

    secret: str


class RevokedKeyOut(ResponseModel):
    """A key that no request can use any more."""

    name: str
    revoked: Literal[True]


class ChangeOut(ResponseModel):
    """A change that was made at run time."""

    model_config = closed(
        number=12,
        at="2026-11-23T12:00:00Z",
        kind="limit",
        name="agent",
        by="http-4f51124d",
        before="$5.00",
        after="$10.00 until 2026-11-24T00:00:00Z",
        reason="a long backtest",
    )
    number: int
    at: Instant
    kind: Literal["definition", "limit", "correction", "key"]
    name: str = Field(description="The budget, or the key.")
    by: str = Field(description="The name of the key that made the change.")
    before: str = Field(description="Empty if nothing was in force.")
    after: str = Field(description="Empty if nothing is in force.")
    reason: str


class ChangesPage(ResponseModel):
    """The log of changes, newest first."""

    changes: list[ChangeOut] = Field(validation_alias="items")
    next_cursor: str | None
    trimmed: bool = Field(
        description="Whether the entries at `cursor` were trimmed; if so, this page is the first page again."
    )


class SettlementOut(ResponseModel):
    """The result of a commit, a release or a recorded spend."""

    model_config = closed(
        id="op_1", state="committed", amounts={"agent": "0.07"}, replayed=False, overrun=False, late=False
    )
    id: str
    state: Literal["committed", "released", "recorded"]
    amounts: AmountsOut
    replayed: bool
    overrun: bool
    late: bool


class Liveness(ResponseModel):
    """The process replies."""

    status: Literal["alive"]


class Readiness(ResponseModel):
    """The store is ready for reservations."""

    status: Literal["ready"]
    checks: dict[Literal["store", "policy", "scripts"], Literal["ok"]]


# -- problems ----------------------------------------------------------------------------------------------------------


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(examples=["urn:ktrdr-budget:problem:unknown-budget"])
    title: str
    status: int
    detail: str
    code: str = Field(description="A stable name for programs.", examples=["unknown-budget"])


class ErrorOut(BaseModel):
    """An invalid value of a request."""

    loc: list[str | int]
    msg: str
    type: str


class InvalidProblem(Problem):
    """An invalid request. `errors`, if present, has the invalid values."""

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
    fits: AmountOut = Field(description="The largest amount that would be granted.")
    retry_after: int | None = Field(description="Seconds until a retry can succeed; `null` if no retry can succeed.")


class TooManyProblem(Problem):
    """The tenant has too many holds or budgets; nothing was written."""

    reason: Literal["too_many_holds", "too_many_budgets"]
    retry_after: int | None = Field(description="Seconds until the first open hold expires; `null` if no hold is open.")


class RefusedProblem(RootModel[DeniedProblem | TooManyProblem]):
    """A budget has no room, or the tenant has too many holds or budgets; nothing was written."""


class UnavailableProblem(Problem):
    """The store is unreachable."""

    ambiguous: bool = Field(
        description="Whether the store may have executed the request; a retry with the same id is safe."
    )


class UnreadyProblem(Problem):
    """The faults of the store."""

    checks: dict[Literal["store", "policy", "scripts"], str]
