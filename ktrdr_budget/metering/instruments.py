"""A span and metrics for each call. They follow the GenAI semantic conventions of OpenTelemetry.

Neither the span nor the metrics contain prompts or answers.

Names and buckets: https://opentelemetry.io/docs/specs/semconv/gen-ai/ (read 2026-11-23). Spans are
recorded only if the process has set a tracer provider, and metrics only if it has set a meter provider.
"""

from __future__ import annotations

import contextvars
import sys
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.telemetry.spans import SCOPE, Span, ending_of, span

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

    from ktrdr_budget.metering.rates import Cost

__all__ = ["CallInstruments", "charged_tokens"]

charged_tokens: ContextVar[Callable[[int], None] | None] = ContextVar("ktrdr_budget_charged_tokens", default=None)
"""A callback for the calls that begin in this context. When a call ends, the callback receives its charged
tokens."""

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS = "gen_ai.usage.cache_creation.input_tokens"
TYPE_OF_TOKENS = "gen_ai.token.type"
ERROR_TYPE = "error.type"
BUDGETS = "ktrdr.budget.names"
BUDGET = "ktrdr.budget.name"
RESERVED = "ktrdr.budget.reserved"
COST = "ktrdr.budget.cost"
ESTIMATED = "ktrdr.budget.estimated"
PRICE_SOURCE = "ktrdr.budget.price_source"

_PROVIDERS = {
    "aws": "aws.bedrock",
    "azure": "azure.ai.openai",
    "google": "gcp.gen_ai",
    "mistral": "mistral_ai",
    "x-ai": "x_ai",
}
"""Maps the name of a provider in the price list to the name in the conventions, if the two names differ."""

TOKEN_BUCKETS = [float(4**power) for power in range(14)]
DURATION_BUCKETS_S = [round(0.01 * 2**power, 2) for power in range(14)]

_instruments: tuple[Any, ...] | None = None


class CallInstruments:
    """The span and the measurements of one call. They begin before the reservation and end with the settlement.

    Args:
        current: whether the call's span becomes the current span; false if the call may end in another context.
    """

    def __init__(self, operation: str, provider: str, model: str, budgets: Sequence[str], *, current: bool) -> None:
        self._names = {OPERATION: operation, PROVIDER: _PROVIDERS.get(provider, provider), REQUEST_MODEL: model}
        self._budgets = budgets
        self._started = time.monotonic()
        self._worst_case: Cost | None = None
        self._on_charged_tokens = charged_tokens.get()
        self._run: Callable[..., Any] = _run_directly if current else contextvars.copy_context().run
        self._span: Span = self._run(self._open_span)

    def _open_span(self) -> Span:
        name = f"{self._names[OPERATION]} {self._names[REQUEST_MODEL]}"
        return span(name, {**self._names, BUDGETS: list(self._budgets)}, kind="client").__enter__()

    def reserved(self, worst_case: Cost) -> None:
        """Set the reserved amount and the price source on the span."""
        self._worst_case = worst_case
        self._span.set_attributes({RESERVED: float(worst_case.amount), PRICE_SOURCE: worst_case.source})

    def denied(self, error: BaseException) -> None:
        """End the span of a call that was not admitted. No metric counts the call, because it was not sent."""
        self._close(error)

    def ended(
        self,
        usage: Usage | None,
        cost: Cost | None,
        error: BaseException | None,
        *,
        estimated: bool,
        charged: Sequence[str],
    ) -> None:
        """End the span and record the metrics.

        Args:
            charged: the names of the budgets in dollars to which the cost is charged.
        """
        if self._span.recording:
            self._span.set_attribute(ESTIMATED, estimated)
            if cost is not None:
                self._span.set_attribute(COST, float(cost.amount))
            if usage is not None:
                self._span.set_attributes(_usage_attributes(usage))
        self._close(error)
        if self._on_charged_tokens is not None:
            self._on_charged_tokens(_count_charged_tokens(usage, cost, self._worst_case))
        if (instruments := _active_instruments()) is not None:
            self._measure(instruments, usage, cost, error, charged)

    def _close(self, error: BaseException | None) -> None:
        if error is not None and (ending := ending_of(error)):
            self._span.set_attributes(ending)
        elif error is not None:
            # The type only: a provider's error message may quote the prompt.
            self._span.set_attribute(ERROR_TYPE, error_type(error))
            self._span.fail(error_type(error))
        self._run(self._span.__exit__, None, None, None)

    def _measure(
        self,
        instruments: tuple[Any, ...],
        usage: Usage | None,
        cost: Cost | None,
        error: BaseException | None,
        charged: Sequence[str],
    ) -> None:
        tokens, duration, spend = instruments
        # A closed generator is not a failure: its consumer stopped reading.
        failed = {} if error is None or isinstance(error, GeneratorExit) else {ERROR_TYPE: error_type(error)}
        duration.record(time.monotonic() - self._started, {**self._names, **failed})
        if usage is not None:
            tokens.record(usage.input_tokens, {**self._names, TYPE_OF_TOKENS: "input"})
            tokens.record(usage.output_tokens, {**self._names, TYPE_OF_TOKENS: "output"})
        if cost is not None:
            for name in charged:
                spend.add(float(cost.amount), {**self._names, BUDGET: name})


def error_type(error: BaseException) -> str:
    """Return the value of ``error.type``: the provider's name for the error, or the HTTP status, or the class name."""
    name = getattr(error, "error_type", None)
    status = getattr(error, "status_code", None)
    return name if isinstance(name, str) else str(status) if isinstance(status, int) else type(error).__qualname__


def _count_charged_tokens(usage: Usage | None, cost: Cost | None, worst_case: Cost | None) -> int:
    """Return the charged tokens: those of the usage, or those of the worst case if the worst case was charged."""
    if cost is None:
        return 0
    charged = sum(line.count for line in cost.lines if line.name.startswith(("input", "output", "cache")))
    if usage is None or (cost is worst_case and charged):
        return charged
    return usage.total_tokens


def _usage_attributes(usage: Usage) -> dict[str, int | None]:
    return {
        INPUT_TOKENS: usage.input_tokens,
        OUTPUT_TOKENS: usage.output_tokens,
        CACHE_READ_TOKENS: usage.cache_read_tokens or None,
        CACHE_WRITE_TOKENS: usage.cache_write_tokens or None,
    }


def make_instruments(meter: Meter) -> tuple[Any, ...]:
    """Create the histograms of tokens and seconds and the counter of dollars on an OpenTelemetry meter."""
    return (
        meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=TOKEN_BUCKETS,
        ),
        meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS_S,
        ),
        meter.create_counter(COST, unit="USD", description="Cost of language model calls, per budget."),
    )


def _active_instruments() -> tuple[Any, ...] | None:
    """The instruments, created at first use; ``None`` as long as the process has no meter provider."""
    global _instruments
    if _instruments is None:
        metrics = sys.modules.get("opentelemetry.metrics")
        if metrics is None or type(metrics.get_meter_provider()).__name__ == "_ProxyMeterProvider":
            return None
        _instruments = make_instruments(metrics.get_meter(SCOPE))
    return _instruments


def _run_directly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
