"""The Pydantic models of the agent's requests and responses."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, RootModel, WithJsonSchema

from ktrdr_budget.api.schemas import (
    AmountOut,
    DeniedProblem,
    Instant,
    InvalidProblem,
    Problem,
    RequestModel,
    ResponseModel,
    TooManyProblem,
    UnavailableProblem,
    closed,
)

__all__ = [
    "ActiveProblem",
    "AgentStatusOut",
    "AgentUnavailableProblem",
    "CancelledOut",
    "CycleOut",
    "CyclesOut",
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


class TriggerIn(RequestModel):
    """The options of a research cycle. If the request has an id, a retry is harmless."""

    model_config = closed(operation_id="op_1", brief="Follow trends of some months.", model="haiku")
    operation_id: Annotated[
        Any,
        PlainValidator(_operation_id),
        WithJsonSchema({"anyOf": [{"type": "string", "pattern": f"^{_OPERATION_ID.pattern}$"}, {"type": "null"}]}),
    ] = None
    strategy: Annotated[str, Field(max_length=_WORD_CHARACTERS), AfterValidator(_text)] | None = Field(
        None, description="An existing strategy to train; the cycle skips the design. Excludes `brief`."
    )
    brief: Annotated[str, Field(max_length=_BRIEF_CHARACTERS), AfterValidator(_text)] | None = Field(
        None, description="Instructions for the design. Excludes `strategy`."
    )
    model: Annotated[str, Field(max_length=_WORD_CHARACTERS), AfterValidator(_text)] | None = Field(
        None, description="The language model of the cycle: a full model name, or `opus`, `sonnet`, `haiku`."
    )
    bypass_gates: Annotated[bool, Field(strict=True)] = Field(
        False, description="Continue the cycle after a failed gate; the result of the gate is recorded."
    )


class TriggerOut(ResponseModel):
    """A cycle has started."""

    model_config = closed(
        triggered=True,
        operation_id="op_1f0c",
        model="ktrdr-scripted-1",
        message="Research cycle op_1f0c started",
    )
    triggered: Literal[True]
    operation_id: str
    model: str = Field(description="The language model of the cycle.")
    message: str


class GateOut(BaseModel):
    """The result of a gate."""

    gate: Literal["training", "backtest"]
    passed: bool
    reason: str
    bypassed: bool = Field(default=False, description="Whether the cycle continues even if the gate fails.")


class CycleOut(ResponseModel):
    """A research cycle."""

    operation_id: str
    operation_type: Literal["agent_research"] = "agent_research"
    status: Literal["running", "cancelling", "completed", "failed", "cancelled"]
    phase: Phase = Field(description="The current phase, or the last phase if the cycle has ended.")
    started_at: Instant
    ended_at: Instant | None
    elapsed_seconds: float
    spend: AmountOut = Field(
        description="Dollars used so far; after the cycle has ended, the committed amount. If the worker was lost "
        "(`worker_lost`), the last amount that the worker reported. In that case, the budget is charged the "
        "unconfirmed amount of the reservation, which has the same id as the cycle."
    )
    estimate: AmountOut = Field(description="Dollars reserved at the start.")
    tokens: dict[Literal["design", "assessment"], int]
    strategy_name: str | None
    model: str | None = Field(description="The language model of the cycle.")
    brief: str | None = Field(description="The instructions for the design.")
    bypass_gates: bool
    gates: list[GateOut]
    outcome: Annotated[str | None, WithJsonSchema({"enum": ["completed", "failed", "cancelled", None]})]
    reason: str | None = Field(
        description="Why the cycle did not complete: `gate_failed`, `budget_exhausted`, `cancelled`, `shutdown`, "
        "`worker_lost` or `error`."
    )
    error: str | None
    results: dict[str, float | int | str | None] = Field(description="The figures of the phases that have ended.")
    replica: str
    trace_id: str


class RemainingOut(ResponseModel):
    """The agent's daily budget in dollars; `null` means unlimited."""

    remaining: AmountOut | None
    daily_limit: AmountOut | None = Field(validation_alias="limit")


class CapacityOut(ResponseModel):
    """The slots for concurrent research cycles on all replicas; `null` means unlimited."""

    active: int = Field(validation_alias="held")
    free: int | None = Field(validation_alias="remaining")
    limit: int | None


class AgentStatusOut(ResponseModel):
    """The agent's state on all replicas, the remaining budget and the free slots."""

    status: Literal["idle"] | Phase = Field(description="The phase of the oldest active cycle, or `idle`.")
    active_cycles: list[CycleOut]
    last_cycle: CycleOut | None = Field(description="The cycle that ended last.")
    budget: RemainingOut | None = Field(
        description="`null` if the store has another definition of the budget, so that the figures are unknown."
    )
    capacity: CapacityOut | None = Field(
        description="`null` if the store has another definition of the slots, so that the figures are unknown."
    )
    as_of: Instant


class CyclesOut(ResponseModel):
    """Running cycles and ended cycles, newest first."""

    cycles: list[CycleOut]
    next_cursor: str | None


class CancelledOut(ResponseModel):
    """A cycle is cancelled, or is being cancelled."""

    operation_id: str
    status: Literal["cancelled", "cancelling"]
    message: str


class _NotTriggered(Problem):
    triggered: Literal[False]
    message: str


class ExhaustedProblem(_NotTriggered, DeniedProblem):
    """The budget has no room for a cycle."""

    reason: Literal["budget_exhausted"]
    denial_reason: Literal["exceeds_limit", "budget_held", "budget_exhausted"]


class ActiveProblem(_NotTriggered):
    """Too many cycles are running, the id was used before, or another definition of a budget is registered."""

    reason: Literal["active_cycle_exists", "id_conflict", "budget_mismatch"]
    operation_ids: list[str] = Field(
        description="Ids of the running cycles if too many cycles are running, else empty."
    )


class AgentUnavailableProblem(_NotTriggered, UnavailableProblem):
    """The store is unreachable."""

    reason: Literal["budget_unavailable"]


class LargeTriggerProblem(_NotTriggered):
    """The body is too large."""

    reason: Literal["content_too_large"]


class InvalidTriggerProblem(_NotTriggered, InvalidProblem):
    """The request is invalid."""

    reason: str = Field(examples=["invalid_request"])


class TooManyTriggerProblem(_NotTriggered, TooManyProblem):
    """The tenant has too many holds or budgets."""


class EndedProblem(Problem):
    """The cycle has ended already."""

    operation_id: str
    cycle_status: Literal["completed", "failed", "cancelled"]


class RefusedTriggerProblem(RootModel[ExhaustedProblem | TooManyTriggerProblem]):
    """No cycle has started: the budget has no room, or the tenant has too many holds."""
