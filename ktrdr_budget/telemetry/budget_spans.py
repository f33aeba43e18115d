"""A span for each call of the limiter: ``ktrdr.budget.reserve``, ``ktrdr.budget.commit``, …"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ktrdr_budget.errors import BudgetExceeded
from ktrdr_budget.models import Settlement
from ktrdr_budget.telemetry.outcomes import outcome_of
from ktrdr_budget.telemetry.spans import operation_of, own_tracer, without_secrets

if TYPE_CHECKING:
    from ktrdr_budget.engine.batching.pending import Observation
    from ktrdr_budget.money import Amount

__all__ = ["trace_call"]

PREFIX = "ktrdr.budget."
_ADMITTING = ("reserve", "grow")


def trace_call(observation: Observation) -> None:
    """Write the span of a finished call. Use this function as an ``observer`` of the limiter.

    The span is a child of the caller's current span. If the caller has no recorded span, no span is
    written. Scrapes and probes, for example, have none.
    """
    from opentelemetry import context, trace

    # A copy, because a context cannot be entered twice, and this function may run in the caller's context.
    caller = observation.context.copy().run(context.get_current)
    parent = trace.get_current_span(caller).get_span_context()
    if not (parent.is_valid and parent.trace_flags.sampled):
        return
    ended_ns = time.time_ns()
    written = own_tracer().start_span(
        PREFIX + observation.operation.replace(" ", "_"),
        caller,
        attributes={PREFIX + name: value for name, value in _attributes(observation).items()} | operation_of(caller),
        start_time=ended_ns - int(observation.seconds * 1e9),
    )
    if observation.error is not None and not isinstance(observation.error, BudgetExceeded):
        text = without_secrets(f"{type(observation.error).__name__}: {observation.error}")
        written.set_attribute("error", text)
        written.set_status(trace.Status(trace.StatusCode.ERROR, text))
    written.end(ended_ns)


def _attributes(observation: Observation) -> dict[str, Any]:
    result, error = observation.result, observation.error
    outcome, reason = outcome_of(result, error)
    found: dict[str, Any] = {"operation": observation.operation}
    if isinstance(result, Settlement):
        outcome = "replayed" if result.replayed else result.state
        found |= _of_settlement(result)
    elif error is None and observation.operation not in _ADMITTING:
        outcome = "ok"
    if hasattr(result, "amounts") and hasattr(result, "id"):
        found |= {"hold_id": result.id, **_of_amounts(result.amounts)}
    if isinstance(error, BudgetExceeded):
        found |= _of_denial(error)
    return found | {"outcome": outcome} | ({"reason": reason} if reason else {})


def _of_amounts(amounts: Mapping[str, Amount]) -> dict[str, Any]:
    return {"names": list(amounts), "amounts": [_plain(amount) for amount in amounts.values()]}


def _of_settlement(settlement: Settlement) -> dict[str, Any]:
    found: dict[str, Any] = {"overrun": settlement.overrun, "late": settlement.late, "deferred": settlement.deferred}
    return found | ({"overruns": list(settlement.overruns)} if settlement.overruns else {})


def _of_denial(error: BudgetExceeded) -> dict[str, Any]:
    found: dict[str, Any] = {"denied_by": error.budget, "requested": _plain(error.requested)}
    found |= {"remaining": _plain(error.remaining), "fits": _plain(error.fits)}
    return found | ({} if error.retry_after is None else {"retry_after_s": error.retry_after})


def _plain(amount: Amount) -> str:
    """Format dollars or a count without an exponent."""
    return f"{amount:f}" if not isinstance(amount, int) else str(amount)
