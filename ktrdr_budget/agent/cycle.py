"""One research cycle on this replica: phases, gates, budget, heartbeat and result."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeVar

from ktrdr_budget.agent.cycle_store import CycleStore, Outcome, Progress
from ktrdr_budget.agent.gates import GateResult, Thresholds, backtest_gate, training_gate
from ktrdr_budget.agent.llm import LLM, Completion
from ktrdr_budget.agent.logs import log_cycle_ended, log_gate_failed
from ktrdr_budget.agent.options import CycleOptions
from ktrdr_budget.agent.phases import Design, Phase, Research
from ktrdr_budget.agent.span_outcomes import set_outcome
from ktrdr_budget.environment import AGENT
from ktrdr_budget.errors import BudgetError, BudgetExceeded, StoreError, StoreUnavailable
from ktrdr_budget.limiter import AsyncBudgetLimiter, AsyncHold
from ktrdr_budget.metering.instruments import charged_tokens
from ktrdr_budget.telemetry.spans import Span, operation_scope, span, suppressed, without_secrets

__all__ = ["OPERATION_TYPE", "Cycle", "CycleDependencies", "Measures", "Plan"]

logger = logging.getLogger("ktrdr_budget")

OPERATION_TYPE = "agent_research"
BEAT_S = 0.25
"""Seconds between two progress reports of a cycle. The reply to a report also shows whether the cycle must stop."""
_RETRY_MAX_S = 5.0
_ERROR_CHARACTERS_MAX = 300
_SPANS: dict[Phase, str] = {
    "designing": "design",
    "training": "training",
    "backtesting": "backtest",
    "assessing": "assessment",
}
_TOKENS: dict[str, str] = {"designing": "design", "training": "design"}

Stop = Literal["cancelled", "shutdown", "worker_lost"]
Result = TypeVar("Result")


class Measures(Protocol):
    """Metrics of a cycle; implemented by :class:`~ktrdr_budget.telemetry.agent_metrics.AgentMetrics`."""

    def cycle_ended(self, outcome: str, seconds: float) -> None: ...
    def phase_ended(self, phase: str, seconds: float) -> None: ...
    def gate(self, gate: str, passed: bool) -> None: ...
    def tokens(self, phase: str, count: int) -> None: ...


@dataclass(frozen=True)
class Plan:
    """The options of a trigger, with the language model and the design that these options select."""

    options: CycleOptions
    llm: LLM
    design: Design | None = None
    """A finished design. If it is set, the cycle skips the phase ``designing``."""


@dataclass(frozen=True)
class CycleDependencies:
    """Dependencies that all cycles of a replica share."""

    limiter: AsyncBudgetLimiter
    cycle_store: CycleStore
    research: Research
    llm: LLM
    thresholds: Thresholds
    measures: Measures
    ttl_s: float
    """Seconds without a heartbeat after which the cycle and its hold expire."""

    @property
    def ttl_ms(self) -> int:
        """The ttl in milliseconds."""
        return int(self.ttl_s * 1000)


class _GateFailedError(Exception):
    """A gate failed, so the cycle ends."""


class UnaskedCancellationError(Exception):
    """A phase raised ``CancelledError`` although the cycle was not cancelled. The cycle fails with this error."""


class Cycle:
    """A cycle whose estimate and slot are reserved. Each phase receives the cycle as its context.

    Args:
        hold: the hold of the estimate and the slot. The hold's id is also the operation id of the cycle.
        link: the span of the trigger. The cycle's span links to this span.
    """

    def __init__(self, dependencies: CycleDependencies, hold: AsyncHold, plan: Plan, link: Any = None) -> None:
        self._dependencies = dependencies
        self.hold = hold
        """The reservation that the cycle spends from."""
        self._plan = plan
        self._link = link
        self._working: asyncio.Task[None] | None = None
        self._stop: Stop | None = None
        self._asked = False
        self._metered_calls = 0
        self._failure = ""
        self._deadline_ms, self._extend_at_s = hold.deadline_ms, time.monotonic() + dependencies.ttl_s / 2
        self.lost_here = False
        """Whether a call on this replica marked the cycle as lost. If so, this replica counts the end of the cycle."""
        self.progress = Progress(
            estimate=format(hold.amounts[AGENT], "f"),
            replica=dependencies.limiter.replica_id,
            phase="designing" if plan.design is None else "training",
            strategy_name=None if plan.design is None else plan.design.strategy_name,
            model=plan.llm.model,
            request=asdict(plan.options),
        )

    @property
    def operation_id(self) -> str:
        """The cycle's id."""
        return self.hold.id

    # -- context of the phases -----------------------------------------------------------------------------------------

    @property
    def brief(self) -> str | None:
        """The trigger's instructions for the design."""
        return self._plan.options.brief

    @property
    def cancelled(self) -> bool:
        """Whether the cycle must stop."""
        return self._stop is not None

    async def ask(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        """Send a prompt to the language model. The cycle's hold covers the cost, and grows if it is too small."""
        if self.cancelled:
            await asyncio.sleep(0)  # a phase that retries in a loop must not block the event loop
            self._raise_if_stopped()
        self._asked = True
        metered_calls = self._metered_calls
        completion = await self._plan.llm.complete(prompt, system=system, max_tokens=max_tokens)
        if self._metered_calls == metered_calls:  # an unmetered model: no meter has counted the tokens
            self._count(completion.usage.total_tokens)
        return completion

    def _count_call(self, tokens: int) -> None:
        """Count the tokens charged for a finished call, even if the call failed."""
        self._asked = True
        self._metered_calls += 1
        self._count(tokens)

    def _count(self, tokens: int) -> None:
        phase = _TOKENS.get(self.progress.phase, "assessment")
        self.progress.tokens[phase] += tokens
        self._dependencies.measures.tokens(phase, tokens)

    # -- life cycle ----------------------------------------------------------------------------------------------------

    def stop(self, why: Stop) -> None:
        """Cancel the current phase. The cycle then commits the accrued spend and ends."""
        if self._stop is None:
            self._stop = why
            if self._working is not None:
                self._working.cancel()

    async def run(self) -> None:
        """Run the phases, settle the hold and write the result."""
        started = time.monotonic()
        with (
            operation_scope(self.operation_id, OPERATION_TYPE),
            span("agent.research_cycle", links=[self._link], root=True) as root,
        ):
            self.progress.trace_id = root.trace_id
            watching = asyncio.create_task(self._watch())
            try:
                # If this task is killed, the hold stays open with its accrued spend, and expires at its deadline.
                async with self._dependencies.limiter.keep(self.hold, on_error="charge"):
                    outcome, reason = await self._work()
                    await self._persist(self._settle)
            finally:
                watching.cancel()
            self._set_root_outcome(root, outcome, reason)
            elapsed_s, measures = time.monotonic() - started, self._dependencies.measures
            log_cycle_ended(self.operation_id, outcome, reason, self.hold.accrued[AGENT], elapsed_s, self.progress)
            if reason != "worker_lost":
                measures.cycle_ended(outcome, elapsed_s)
            owner, cycle_store = self._dependencies.limiter.replica_id, self._dependencies.cycle_store
            lost = await self._persist(
                lambda: cycle_store.end(self.operation_id, owner, outcome, reason, self._snapshot())
            )
            if reason == "worker_lost" and (self.lost_here or not lost):
                measures.cycle_ended(outcome, elapsed_s)  # else the other replica counted

    async def _work(self) -> tuple[Outcome, str | None]:
        """Run the phases. Return the outcome, and the reason if the cycle did not complete."""
        self._working = asyncio.create_task(self._phases())
        if self._stop is not None:
            self._working.cancel()
        try:
            await asyncio.wait((self._working,))
        finally:
            self._working.cancel()
        error = None if self._working.cancelled() else self._working.exception()
        if error is None and not self._working.cancelled():
            return "completed", None
        if error is None or (self._stop is not None and not isinstance(error, (_GateFailedError, BudgetExceeded))):
            return ("failed" if self._stop == "worker_lost" else "cancelled"), self._stop or "cancelled"
        self.progress.error = without_secrets(str(error) or type(error).__name__, _ERROR_CHARACTERS_MAX)
        if isinstance(error, _GateFailedError):
            return "failed", "gate_failed"
        if isinstance(error, BudgetExceeded):
            return "failed", "budget_exhausted"
        self.progress.error = f"{type(error).__name__}: {self.progress.error}"
        logger.warning("cycle %s failed while %s: %s", self.operation_id, self.progress.phase, self.progress.error)
        return "failed", "error"

    def _set_root_outcome(self, root: Span, outcome: Outcome, reason: str | None) -> None:
        progress = self._snapshot()
        root.set_attributes(
            {
                "outcome": outcome,
                "reason": reason,
                "strategy_name": progress.strategy_name,
                "model": progress.model,
                "tokens": self._tokens,
                "ktrdr.budget.spend": progress.spend,
            }
        )
        if outcome == "failed" and reason != "budget_exhausted":
            error = progress.error if reason == "gate_failed" else self._failure
            root.fail(error or reason or outcome)

    # -- phases --------------------------------------------------------------------------------------------------------

    async def _phases(self) -> None:
        research, thresholds = self._dependencies.research, self._dependencies.thresholds
        charged_tokens.set(self._count_call)
        if (design := self._plan.design) is None:
            with self._phase("designing") as current:
                design = await self._result_of(research.design(self))
                self.progress.strategy_name = str(design.strategy_name)
                current.set_attribute("strategy_name", self.progress.strategy_name)
        with self._phase("training") as current:
            training = await self._result_of(research.train(self, design))
            loss = {"final_loss": training.final_loss, "loss_decrease": training.loss_decrease}
            self._add_results(current, accuracy=training.accuracy, **loss)
            self._apply_gate(current, training_gate(training, thresholds))
        with self._phase("backtesting") as current:
            backtest = await self._result_of(research.backtest(self, design, training))
            self._add_results(
                current,
                win_rate=backtest.win_rate,
                max_drawdown=backtest.max_drawdown,
                sharpe_ratio=backtest.sharpe_ratio,
                trades=backtest.trades,
            )
            self._apply_gate(current, backtest_gate(backtest, thresholds))
        with self._phase("assessing") as current:
            assessment = await self._result_of(research.assess(self, design, training, backtest))
            self._add_results(current, verdict=assessment.verdict)
            self.progress.results |= {name: _plain(value) for name, value in asdict(assessment).items()}

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[Span]:
        self._raise_if_stopped()
        self.progress.phase, self._asked = phase, False
        started, tokens_before = time.monotonic(), self._tokens
        attributes = {"phase": phase, "strategy_name": self.progress.strategy_name}
        failure: BaseException | None = None
        with span(f"agent.phase.{_SPANS[phase]}", attributes) as current:
            try:
                yield current
            except BaseException as error:  # raised again below, after the span has its outcome
                failure = error
            self._failure = set_outcome(current, failure, asked=self._asked)
            if self._asked:
                current.set_attribute("tokens", self._tokens - tokens_before)
            self._dependencies.measures.phase_ended(phase, time.monotonic() - started)
        if failure is not None:
            raise failure

    @property
    def _tokens(self) -> int:
        return sum(self.progress.tokens.values())

    async def _result_of(self, work: Awaitable[Result]) -> Result:
        """Await the result of a phase. Raise if the cycle must stop: the phase may have suppressed the cancellation."""
        try:
            result = await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.cancelled and task is not None and not task.cancelling():
                raise UnaskedCancellationError("CancelledError raised by the phase itself") from None
            raise
        self._raise_if_stopped()
        return result

    def _raise_if_stopped(self) -> None:
        if self.cancelled:
            raise asyncio.CancelledError

    def _add_results(self, current: Span, **results: Any) -> None:
        figures = {name: _plain(value, infinite=True) for name, value in results.items()}
        current.set_attributes(figures)
        self.progress.results |= {name: _plain(value) for name, value in figures.items()}

    def _apply_gate(self, current: Span, result: GateResult) -> None:
        bypassed = self._plan.options.bypass_gates
        judged: dict[str, bool | str] = {"passed": result.passed, "reason": result.reason, "bypassed": bypassed}
        current.set_attributes({f"gate.{name}": value for name, value in judged.items()})
        self.progress.gates.append({"gate": result.gate, **judged})
        if bypassed:
            return
        self._dependencies.measures.gate(result.gate, result.passed)
        if not result.passed:
            log_gate_failed(self.operation_id, result.gate, result.reason)
            raise _GateFailedError(f"{result.gate} gate: {result.reason}")

    # -- records in the store ------------------------------------------------------------------------------------------

    def _snapshot(self) -> Progress:
        self.progress.spend = format(self.hold.accrued[AGENT], "f")
        return self.progress

    async def begin(self) -> bool:
        """Write the record of this new cycle. Return false if the store already has a cycle with this id."""
        owner, dependencies = self._dependencies.limiter.replica_id, self._dependencies
        return await dependencies.cycle_store.start(self.operation_id, owner, dependencies.ttl_ms, self._snapshot())

    async def _watch(self) -> None:
        """Report progress periodically. Stop the cycle if a reply shows that it was cancelled or marked as lost."""
        with suppressed():
            while True:
                try:
                    await self._beat()
                except BudgetError as error:
                    logger.warning("progress report failed for cycle %s: %s", self.operation_id, error)
                except Exception:  # a bug must not end the reports, without which the cycle would count as lost
                    logger.exception("progress report failed for cycle %s", self.operation_id)
                await asyncio.sleep(BEAT_S)

    async def _beat(self) -> None:
        owner, cycle_store = self._dependencies.limiter.replica_id, self._dependencies.cycle_store
        status = await cycle_store.beat(self.operation_id, owner, self._snapshot())
        if not status:
            self.stop("worker_lost")
            return
        if status == "cancelling":
            self.stop("cancelled")
        now_s, ttl_s, hold = time.monotonic(), self._dependencies.ttl_s, self.hold
        if hold.deadline_ms != self._deadline_ms:
            self._deadline_ms, self._extend_at_s = hold.deadline_ms, now_s + ttl_s / 2
        elif now_s > self._extend_at_s and not (hold.settled or hold.settling):
            # The hold's own heartbeat has failed, and its next attempt may come after the deadline.
            self._extend_at_s = now_s + ttl_s / 8
            await hold.extend()

    async def _settle(self) -> None:
        """Commit the accrued spend. If nothing was accrued, release the hold. Both free the slot of the cycle."""
        if self.hold.accrued[AGENT]:
            await self.hold.commit()
        else:
            await self.hold.release()

    async def _persist(self, work: Callable[[], Awaitable[Result]]) -> Result | None:
        """Retry a write until the store is available. Return ``None`` if the store rejects the write."""
        pause_s = 0.1
        while True:
            try:
                return await work()
            except StoreError as error:
                logger.error("result of cycle %s was rejected by the store: %s", self.operation_id, error)
                return None
            except StoreUnavailable as error:
                logger.warning("result of cycle %s cannot be written yet: %s", self.operation_id, error)
            except BudgetError as error:  # an operator has settled the hold
                logger.error("cycle %s could not be settled: %s", self.operation_id, error)
                return None
            await asyncio.sleep(pause_s)
            pause_s = min(_RETRY_MAX_S, pause_s * 2)


def _plain(value: Any, *, infinite: bool = False) -> Any:
    """Convert a value of a result for JSON or a span. Integers and texts stay; other numbers become floats.

    Args:
        infinite: keep infinity and NaN, for a span. Default: replace them by ``None``, because JSON has neither.
    """
    if value is None or isinstance(value, (int, str)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)
    return number if infinite or math.isfinite(number) else None
