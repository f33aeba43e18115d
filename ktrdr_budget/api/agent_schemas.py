"""The shapes of the agent's part of the HTTP interface."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, RootModel, WithJsonSchema

from ktrdr_budget.api.schemas import (
    AmountOut,
    CrowdedProblem,
    DeniedProblem,
    HoldsQuery,
    Instant,
    InvalidProblem,
    Problem,
    UnavailableProblem,
    _Answer,
    _Request,
    _shape,
)

__all__ = [
    "ActiveProblem",
    "AgentStatusOut",
    "AgentUnavailableProblem",
    "CancelledOut",
    "CycleOut",
    "CyclesOut",
    "CyclesQuery",
    "EndedProblem",
    "ExhaustedProblem",
    "InvalidTriggerProblem",
    "LargeTriggerProblem",
    "RefusedTriggerProblem",
    "TriggerIn",
    "TriggerOut",
]

_OPERATION_ID = re.compile(r"op_[A-Za-z0-9._-]{1,120}", re.ASCII)
Phase = Literal["designing", "training", "backtesting", "assessing"]


_BRIEF_CHARACTERS = 4000
_WORD_CHARACTERS = 128


def _operation_id(value: Any) -> Any:
    if value is None or (isinstance(value, str) and _OPERATION_ID.fullmatch(value)):
        return value
    raise ValueError(f"must match {_OPERATION_ID.pattern}")


def _text(value: str) -> str:
    text = value.strip()
    if not text:
        raise ValueError("must not be empty")
    return text


class TriggerIn(_Request):
    """Begins a research cycle; with an id, a retry is harmless."""

    model_config = _shape(operation_id="op_1", brief="Follow trends of some months.", model="haiku")
    operation_id: Annotated[
        Any,
        PlainValidator(_operation_id),
        WithJsonSchema({"anyOf": [{"type": "string", "pattern": f"^{_OPERATION_ID.pattern}$"}, {"type": "null"}]}),
    ] = None
    strategy: Annotated[str, Field(max_length=_WORD_CHARACTERS), AfterValidator(_text)] | None = Field(
        None, description="A strategy that is designed already: the cycle begins with its training. Not with `brief`."
    )
    brief: Annotated[str, Field(max_length=_BRIEF_CHARACTERS), AfterValidator(_text)] | None = Field(
        None, description="What the design shall follow, in words. Not with `strategy`."
    )
    model: Annotated[str, Field(max_length=_WORD_CHARACTERS), AfterValidator(_text)] | None = Field(
        None, description="The language model of this cycle: its name, or `opus`, `sonnet`, `haiku`."
    )
    bypass_gates: Annotated[bool, Field(strict=True)] = Field(
        False, description="Gates are evaluated and recorded, and stop nothing."
    )


class TriggerOut(_Answer):
    """A cycle was begun."""

    model_config = _shape(
        triggered=True,
        operation_id="op_1f0c",
        model="ktrdr-scripted-1",
        message="Research cycle op_1f0c started",
    )
    triggered: Literal[True]
    operation_id: str
    model: str = Field(description="The language model that it asks.")
    message: str


class CyclesQuery(HoldsQuery):
    """Which cycles."""


class GateOut(BaseModel):
    """What a gate said."""

    gate: Literal["training", "backtest"]
    passed: bool
    reason: str
    bypassed: bool = Field(default=False, description="It was evaluated, and stopped nothing in any case.")


class CycleOut(_Answer):
    """A research cycle."""

    operation_id: str
    operation_type: Literal["agent_research"]
    status: Literal["running", "cancelling", "completed", "failed", "cancelled"]
    phase: Phase = Field(description="The phase that it is in, or was in last.")
    started_at: Instant
    ended_at: Instant | None
    elapsed_seconds: float
    spend: AmountOut = Field(
        description="Dollars used so far; what was committed, once it has ended. Of one whose worker was lost "
        "(`worker_lost`): what it had reported last. What its budget is charged for it, unconfirmed, is told by the "
        "reservation of the same id."
    )
    estimate: AmountOut = Field(description="Dollars that were reserved at its start.")
    tokens: dict[Literal["design", "assessment"], int]
    strategy_name: str | None
    model: str | None = Field(description="The language model that it asks.")
    brief: str | None = Field(description="What its trigger asked the design to follow.")
    bypass_gates: bool
    gates: list[GateOut]
    outcome: Literal["completed", "failed", "cancelled"] | None
    reason: str | None = Field(
        description="Why it did not complete: `gate_failed`, `budget_exhausted`, `cancelled`, `shutdown`, "
        "`worker_lost` or `error`."
    )
    error: str | None
    results: dict[str, float | int | str | None] = Field(description="Figures of its phases, as far as it got.")
    replica: str
    trace_id: str


class RemainingOut(BaseModel):
    """The agent's daily budget; `null` is unlimited."""

    remaining: AmountOut | None
    daily_limit: AmountOut | None


class CapacityOut(BaseModel):
    """Research cycles at once, of all replicas; `null` is unlimited."""

    active: int
    free: int | None
    limit: int | None


class AgentStatusOut(_Answer):
    """What the agent is doing, on whatever replica, and what it may do yet."""

    status: Literal["idle"] | Phase = Field(description="The phase of the oldest active cycle, or `idle`.")
    active_cycles: list[CycleOut]
    last_cycle: CycleOut | None = Field(description="The one that ended last.")
    budget: RemainingOut | None = Field(description="`null` if unknown: the budget is defined otherwise elsewhere.")
    capacity: CapacityOut | None = Field(description="Likewise.")
    as_of: Instant


class CyclesOut(_Answer):
    """Cycles: those that run, and those that have ended, newest first."""

    cycles: list[CycleOut]
    next_cursor: str | None


class CancelledOut(_Answer):
    """A cycle was cancelled, or will be soon."""

    operation_id: str
    status: Literal["cancelled", "cancelling"]
    message: str


class _NotTriggered(Problem):
    triggered: Literal[False]
    message: str


class ExhaustedProblem(_NotTriggered, DeniedProblem):
    """There is no money for a cycle."""

    reason: Literal["budget_exhausted"]
    denial_reason: Literal["exceeds_limit", "budget_held", "budget_exhausted"]


class ActiveProblem(_NotTriggered):
    """As many cycles as may run at once are running, the id was used before, or a budget is defined otherwise."""

    reason: Literal["active_cycle_exists", "id_conflict", "budget_mismatch"]
    operation_ids: list[str] = Field(description="The cycles that are running, where those are the reason.")


class AgentUnavailableProblem(_NotTriggered, UnavailableProblem):
    """The store cannot be reached."""

    reason: Literal["budget_unavailable"]


class LargeTriggerProblem(_NotTriggered):
    """The body is too large."""

    reason: Literal["content_too_large"]


class InvalidTriggerProblem(_NotTriggered, InvalidProblem):
    """The request is not valid."""

    reason: str = Field(examples=["invalid_request"])


class CrowdedTriggerProblem(_NotTriggered, CrowdedProblem):
    """The tenant has as many holds, or budgets, as it may."""


class EndedProblem(Problem):
    """The cycle has ended already."""

    operation_id: str
    cycle_status: Literal["completed", "failed", "cancelled"]


class RefusedTriggerProblem(RootModel[ExhaustedProblem | CrowdedTriggerProblem]):
    """No cycle was begun: there is no money for one, or the tenant has too many holds."""
