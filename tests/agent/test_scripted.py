"""The scripted model: deterministic replies to the bundled research, metered like those of a real model."""

from __future__ import annotations

import asyncio
import math
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded
from ktrdr_budget.agent import prompts, scripted
from ktrdr_budget.agent.llm import Completion
from ktrdr_budget.agent.phases import Backtest, Design, Training
from ktrdr_budget.agent.research import ExampleResearch
from ktrdr_budget.agent.scripted import SCRIPTED_PRICE, ScriptedLLM, tokens_in
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import Prices
from ktrdr_budget.metering.usage import Usage

from ..helpers.waiting import until

BUDGETS = [Budget("agent", "1.00")]
DESIGN = prompts.design_prompt("op_1")


def scripted_llm(limiter: AsyncBudgetLimiter, tokens_per_second: float = math.inf) -> ScriptedLLM:
    return ScriptedLLM(Meter(limiter, ["agent"], Prices([SCRIPTED_PRICE])), tokens_per_second=tokens_per_second)


def dollars(usage: Usage) -> Decimal:
    """The cost at the scripted model's price: $15 per million input tokens, $75 per million output tokens."""
    return (usage.input_tokens * Decimal(15) + usage.output_tokens * Decimal(75)) / 10**6


async def spent(limiter: AsyncBudgetLimiter) -> Decimal:
    return (await limiter.status("agent")).spent


class Context:
    """A phase context that counts its calls."""

    brief: str | None = None
    cancelled = False

    def __init__(self, operation_id: str, llm: ScriptedLLM) -> None:
        self.operation_id = operation_id
        self.used: list[Usage] = []
        self._llm = llm

    async def ask(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        completion = await self._llm.complete(prompt, system=system, max_tokens=max_tokens)
        self.used.append(completion.usage)
        return completion


# -- replies -----------------------------------------------------------------------------------------------------------


async def test_the_same_prompt_gives_the_same_reply_and_tokens(limiter):
    llm = scripted_llm(limiter)
    first = await llm.complete(DESIGN, system=prompts.SYSTEM)
    assert await llm.complete(DESIGN, system=prompts.SYSTEM) == first
    assert first.model == "ktrdr-scripted-1"
    assert (await llm.complete(prompts.design_prompt("op_2"))).text != first.text


def test_the_scripted_designs_of_sixty_cycles_cover_all_strategies_and_can_be_parsed():
    designs = [prompts.parse_design(scripted.answer(prompts.design_prompt(f"op_{number}"))) for number in range(60)]
    assert len({design.strategy_name for design in designs}) == 4
    assert len({tuple(design.parameters.items()) for design in designs}) == 60


@pytest.mark.parametrize(
    ("ratio", "fall", "trades", "verdict"),
    [
        (1.4, 0.1, 40, "promising"),
        (1.4, 0.1, 3, "mediocre"),
        (0.6, 0.1, 40, "mediocre"),
        (0.1, 0.1, 40, "poor"),
        (-2.0, 0.1, 40, "poor"),
        (1.4, 0.5, 40, "poor"),
    ],
)
def test_the_verdict_depends_on_the_figures_of_the_backtest(ratio: float, fall: float, trades: int, verdict: str):
    backtest = Backtest(win_rate=0.4, max_drawdown=fall, sharpe_ratio=ratio, trades=trades)
    prompt = prompts.assessment_prompt(Design("momentum"), Training(0.5, 0.7, 0.68), backtest)
    found = prompts.parse_assessment(scripted.answer(prompt))
    assert found.verdict == verdict
    assert f"Sharpe ratio of {ratio:.2f}" in found.summary


def test_an_unsupported_prompt_gets_a_fixed_reply():
    assert scripted.answer("Hello?") == "A scripted model knows the prompts of the bundled research only."


# -- cost --------------------------------------------------------------------------------------------------------------


async def test_a_call_is_charged_for_its_tokens_at_the_documented_price(limiter):
    completion = await scripted_llm(limiter).complete(DESIGN, system=prompts.SYSTEM)
    assert completion.usage.input_tokens == 500 + tokens_in(DESIGN) + tokens_in(prompts.SYSTEM)
    assert completion.usage.output_tokens > tokens_in(completion.text)
    assert await spent(limiter) == dollars(completion.usage)
    [entry] = await limiter.ledger("agent")
    assert (entry.kind, entry.amount) == ("commit", dollars(completion.usage))


async def test_the_cost_of_a_default_cycle_stays_within_the_estimate(server):
    """The limit equals the estimate, so the hold cannot grow."""
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "0.15")]) as limiter:
        context = Context("op_1", scripted_llm(limiter))
        research = ExampleResearch(phase_seconds=0)
        async with limiter.hold("agent", "0.15"):
            design = await research.design(context)
            training = await research.train(context, design)
            backtest = await research.backtest(context, design, training)
            await research.assess(context, design, training, backtest)
        assert len(context.used) == 2
        cost = sum(map(dollars, context.used))
        assert Decimal("0.05") <= cost <= Decimal("0.08")
        assert await spent(limiter) == cost


async def test_a_call_with_a_cost_above_the_budget_is_denied_without_any_charge(server):
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "0.05")]) as limiter:
        with pytest.raises(BudgetExceeded):
            await scripted_llm(limiter).complete(DESIGN)
        assert await spent(limiter) == 0


async def test_a_reply_is_cut_off_at_max_tokens(limiter):
    llm = scripted_llm(limiter)
    whole = await llm.complete(DESIGN)
    cut = await llm.complete(DESIGN, max_tokens=whole.usage.output_tokens - 10)
    assert cut.usage.output_tokens == whole.usage.output_tokens - 10
    assert whole.text.startswith(cut.text)
    assert cut.text != whole.text
    nothing = await llm.complete(DESIGN, max_tokens=1)
    assert (nothing.text, nothing.usage.output_tokens) == ("", 1)


async def test_a_cancelled_call_is_charged_for_the_input_and_for_the_output_received_so_far(limiter):
    whole = (await scripted_llm(limiter).complete(DESIGN)).usage
    before = await spent(limiter)
    async with limiter.hold("agent", "0.15") as hold:
        task = asyncio.create_task(scripted_llm(limiter, tokens_per_second=200).complete(DESIGN))
        at_least = dollars(Usage(whole.input_tokens, 32))
        await until(lambda: hold.accrued["agent"] >= at_least)  # accrued on the hold during the call
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    cost = await spent(limiter) - before
    assert at_least <= cost < dollars(whole)
    # Whole chunks of output, plus the entire input.
    assert (cost - dollars(Usage(whole.input_tokens))) % dollars(Usage(0, 16)) == 0


async def test_the_scripted_model_sends_output_at_the_configured_rate(limiter):
    llm = scripted_llm(limiter, tokens_per_second=5000)
    before = asyncio.get_running_loop().time()
    usage = (await llm.complete(DESIGN)).usage
    assert asyncio.get_running_loop().time() - before >= usage.output_tokens / 5000


@pytest.mark.parametrize("speed", [0, -1, math.nan])
async def test_an_invalid_output_rate_is_rejected(limiter, speed: float):
    with pytest.raises(InvalidArgument, match="tokens_per_second must be positive"):
        scripted_llm(limiter, speed)
