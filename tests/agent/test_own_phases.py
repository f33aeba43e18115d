"""A backend's own phases and language models may misbehave. They are stopped, and their cost is counted."""

from __future__ import annotations

import asyncio
import contextlib
from decimal import Decimal
from fractions import Fraction

import pytest

from ktrdr_budget import AsyncBudgetLimiter
from ktrdr_budget.agent.phases import Assessment, Backtest, Design, Training
from ktrdr_budget.agent.scripted import SCRIPTED_PRICE, ScriptedLLM
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage

from ..helpers.waiting import until

# -- tokens ------------------------------------------------------------------------------------------------------------


def scripted(tokens_per_second: float = 100.0):
    """A scripted model slow enough to be interrupted."""

    def make(limiter: AsyncBudgetLimiter) -> ScriptedLLM:
        return ScriptedLLM(Meter(limiter, ["agent"], Prices([SCRIPTED_PRICE])), tokens_per_second=tokens_per_second)

    return make


async def _has_used(stage, operation_id: str) -> bool:
    return Decimal((await stage.view(operation_id)).progress["spend"]) > 0


async def test_the_tokens_counted_for_a_cancelled_call_match_the_charged_cost(make_stage):
    stage = await make_stage(make_llm=scripted())
    started = await stage.agent.trigger()
    await until(lambda: _has_used(stage, started.operation_id))
    await stage.agent.cancel(started.operation_id)
    cycle = await stage.ended(started.operation_id)
    spent, *nothing = await stage.figures()
    assert (cycle.outcome, cycle.progress["spend"], nothing) == ("cancelled", str(spent), [0, 0, 0])
    tokens = cycle.progress["tokens"]
    assert tokens["assessment"] == 0
    assert stage.tally.token_counts == {"design": tokens["design"]}
    # $15 per million tokens in, $75 out: each token is one or the other.
    assert spent / 75 * 10**6 <= tokens["design"] <= spent / 15 * 10**6


class Unsure:
    """A language model whose calls fail. A failed call was either rejected without cost, or its usage is unknown."""

    provider, model = "acme", "road"

    def __init__(self, limiter: AsyncBudgetLimiter, *, rejected: bool) -> None:
        self._meter = Meter(limiter, ["agent"], Prices([ModelPrice("acme", "road", "10", "50")]))
        self._rejected = rejected

    async def complete(self, prompt: str, *, system: str = "", max_tokens: int = 1024):
        call = self._meter.call(provider="acme", model="road", input_tokens_max=300, output_tokens_max=200)
        async with call:
            if self._rejected:
                call.rejected()
            else:
                call.report(Usage(100, 7))
                call.unknown()
            raise ConnectionResetError

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(("rejected", "tokens"), [(True, 0), (False, 500)])
async def test_the_tokens_counted_for_a_failed_call_match_the_charged_cost(make_stage, rejected, tokens):
    stage = await make_stage(make_llm=lambda limiter: Unsure(limiter, rejected=rejected))
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert (cycle.outcome, cycle.reason) == ("failed", "error")
    assert cycle.progress["tokens"] == {"design": tokens, "assessment": 0}
    assert stage.tally.token_counts["design"] == tokens
    assert (await stage.figures())[0] == (0 if rejected else Decimal("0.013"))


async def test_the_tokens_of_a_model_call_made_without_the_phase_context_are_counted(make_stage):
    stage = await make_stage(make_llm=scripted())
    own = scripted(float("inf"))(stage.limiter)

    async def design(context) -> Design:
        await own.complete("a question")
        return Design("momentum")

    async def assess(*_) -> Assessment:
        return Assessment("poor", "")

    stage.script.design, stage.script.assess = design, assess
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert cycle.outcome == "completed"
    assert cycle.progress["tokens"]["design"] == stage.tally.token_counts["design"] > 500


# -- results -----------------------------------------------------------------------------------------------------------


class Real:
    """A number type as in NumPy: it is no ``float``, and its comparisons return no ``bool``."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value

    def __ge__(self, other):
        return Truth(self.value >= other)

    __le__ = __gt__ = __lt__ = __ge__

    def __format__(self, how: str) -> str:
        return format(self.value, how)


class Truth:
    def __init__(self, value: bool) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return self.value


@pytest.mark.parametrize("kind", [Decimal, Fraction, Real])
async def test_figures_of_any_numeric_type_are_recorded_as_json_numbers(stage, kind):
    stage.script.training = Training(accuracy=kind(0.5), initial_loss=0.75, final_loss=0.5)
    stage.script.backtest_result = Backtest(win_rate=0.5, max_drawdown=0.1, sharpe_ratio=float("inf"), trades=20)
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert (cycle.outcome, cycle.reason) == ("failed", "gate_failed")
    results = cycle.progress["results"]
    assert results["accuracy"] == 0.5
    assert type(results["accuracy"]) is float
    assert (results["sharpe_ratio"], results["trades"]) == (None, 20)
    assert [gate["passed"] for gate in cycle.progress["gates"]] == [True, False]
    assert stage.tally.outcomes == {"failed": 1}


async def test_an_assessment_summary_of_any_type_is_recorded_as_text(stage):
    async def assess(*_) -> Assessment:
        return Assessment("poor", ["not", "a", "text"])

    stage.script.assess = assess
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert (cycle.outcome, cycle.progress["results"]["summary"]) == ("completed", "['not', 'a', 'text']")


# -- stopping ----------------------------------------------------------------------------------------------------------


async def test_no_further_phase_starts_after_a_phase_has_suppressed_a_cancellation(stage):
    async def train(*_) -> Training:
        stage.script.entered["training"] += 1
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return stage.script.training

    stage.script.train = train
    started = await stage.agent.trigger()
    await stage.reaches("training")
    assert await stage.agent.cancel(started.operation_id) == "cancelled"
    cycle = await stage.ended(started.operation_id)
    assert (cycle.outcome, cycle.progress["phase"], cycle.progress["gates"]) == ("cancelled", "training", [])
    assert "backtesting" not in stage.script.entered
    assert await stage.figures() == (Decimal("0.02"), 0, 0, 0)


async def test_a_phase_that_suppresses_a_cancellation_cannot_send_further_prompts(stage):
    refused = []

    async def design(context) -> Design:
        stage.script.entered["designing"] += 1
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        for _ in range(3):
            try:
                await context.ask("one more")
            except asyncio.CancelledError:
                refused.append(True)
        return Design("momentum")

    stage.script.design = design
    started = await stage.agent.trigger()
    await stage.reaches("designing")
    await stage.agent.cancel(started.operation_id)
    assert (await stage.ended(started.operation_id)).outcome == "cancelled"
    assert len(refused) == 3
    assert await stage.figures() == (0, 0, 0, 0)


async def test_the_cycle_fails_if_a_phase_raises_cancelled_error_without_a_cancel_request(stage):
    async def train(*_) -> Training:
        raise asyncio.CancelledError

    stage.script.train = train
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    assert (cycle.outcome, cycle.reason) == ("failed", "error")
    assert "raised by the phase itself" in cycle.progress["error"]
    assert await stage.figures() == (Decimal("0.02"), 0, 0, 0)
