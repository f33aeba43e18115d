"""The bundled research: its results, its cancellation, and the absence of look-ahead."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from ktrdr_budget.agent.gates import Thresholds, backtest_gate, training_gate
from ktrdr_budget.agent.llm import Completion
from ktrdr_budget.agent.market import PriceSeries, bundled_prices
from ktrdr_budget.agent.phases import Assessment, Backtest, Design, Training
from ktrdr_budget.agent.prompts import UnusableAnswer
from ktrdr_budget.agent.research import ExampleResearch
from ktrdr_budget.agent.scripted import answer
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.metering.usage import Usage

from ..helpers.stopwatch import Stopwatch
from ..helpers.waiting import until


class Context:
    """A phase context that only sends prompts."""

    brief: str | None = None

    def __init__(self, operation_id: str = "op_1", answers: list[str] | None = None) -> None:
        self.operation_id = operation_id
        self.asked: list[str] = []
        self.threads: set[int] = set()
        self.pauses = 0
        self.stop = threading.Event()
        self._answers = answers

    @property
    def cancelled(self) -> bool:
        self.threads.add(threading.get_ident())
        self.pauses += 1
        return self.stop.is_set()

    async def ask(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        self.asked.append(prompt)
        text = answer(prompt) if self._answers is None else self._answers.pop(0)
        return Completion(text, Usage(), "test-1")


class Endless(Context):
    """A phase context that stops a computing thread at each pause until the test sets ``go_on``."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.go_on = threading.Event()

    @property
    def cancelled(self) -> bool:
        self.entered.set()
        self.go_on.wait(10)
        return super().cancelled


async def cycle(research: ExampleResearch, context: Context) -> tuple[Design, Training, Backtest, Assessment]:
    design = await research.design(context)
    training = await research.train(context, design)
    backtest = await research.backtest(context, design, training)
    return design, training, backtest, await research.assess(context, design, training, backtest)


def at_once(prices: PriceSeries | None = None) -> ExampleResearch:
    return ExampleResearch(prices, phase_seconds=0)


async def test_a_cycle_returns_a_design_and_figures_and_an_assessment():
    context = Context()
    design, training, backtest, assessment = await cycle(at_once(), context)
    assert design.strategy_name in context.asked[0]
    assert training.initial_loss == pytest.approx(0.693147, abs=1e-6)
    assert 0.4 < training.accuracy < 0.7
    assert 0 < backtest.max_drawdown < 1
    assert backtest.trades > 0
    assert assessment.verdict in ("promising", "mediocre", "poor")
    assert len(context.asked) == 2


async def test_two_cycles_with_the_same_id_have_equal_results():
    first = await cycle(at_once(), Context("op_7"))
    assert await cycle(at_once(), Context("op_7")) == first


async def test_cycles_with_different_ids_get_different_designs_and_pass_the_default_gates():
    thresholds, found = Thresholds(), []
    for number in range(16):
        design, training, backtest, assessment = await cycle(at_once(), Context(f"op_{number:016x}"))
        assert training_gate(training, thresholds).passed
        assert backtest_gate(backtest, thresholds).passed
        found.append((design, training, backtest, assessment))
    assert {design.strategy_name for design, *_ in found} == {
        "momentum",
        "trend_following",
        "short_term_reversal",
        "volatility_targeting",
    }
    assert len({assessment.verdict for *_, assessment in found}) > 1
    # Stricter gates reject some of the designs.
    strict = Thresholds(min_accuracy=0.54, min_sharpe=0.9)
    assert len({training_gate(training, strict).passed for _, training, *_ in found}) == 2
    assert len({backtest_gate(backtest, strict).passed for _, _, backtest, _ in found}) == 2


# -- no look-ahead -----------------------------------------------------------------------------------------------------


def with_other_end(prices: PriceSeries, unchanged: int) -> PriceSeries:
    """Return a copy of the prices. The copy differs from the original after the first ``unchanged`` days."""
    others = [150 + 50 * (day * 7 % 11) / 11 for day in range(len(prices) - unchanged)]
    return PriceSeries(prices.days, (*prices.closes[:unchanged], *others))


async def test_the_backtest_prices_affect_neither_the_model_nor_the_training_figures():
    prices, context = bundled_prices(), Context()
    traded_from = 120 + round((len(prices) - 120) * 0.7)
    design = await at_once().design(context)
    changed = at_once(with_other_end(prices, traded_from + 1))
    known, other = await at_once().train(context, design), await changed.train(context, design)
    assert other == known
    assert (await changed.backtest(context, design, other)) != (await at_once().backtest(context, design, known))


async def test_the_validation_prices_affect_the_training_figures_but_not_the_model():
    prices, context = bundled_prices(), Context()
    measured_from = 120 + round((len(prices) - 120) * 0.5)
    design = await at_once().design(context)
    known = await at_once().train(context, design)
    other = await at_once(with_other_end(prices, measured_from + 1)).train(context, design)
    assert other.model == known.model
    assert other.accuracy != known.accuracy


# -- unusable replies --------------------------------------------------------------------------------------------------


async def test_the_prompt_is_sent_again_with_the_reason_after_an_unusable_reply():
    good = answer("Strategies: " + '{"momentum": {"description": "", "parameters": {"epochs": [40, 120]}}}')
    bad = Context(answers=["I cannot.", good])
    with pytest.raises(UnusableAnswer, match="momentum_days"):  # the second reply lacks parameters
        await at_once().design(bad)
    assert bad.asked[1].startswith(bad.asked[0])
    assert "could not be used: there is no JSON object with 'strategy' in it." in bad.asked[1]


async def test_a_usable_second_reply_is_accepted_after_an_unusable_first_reply():
    context = Context()
    design = await at_once().design(context)
    again = Context(answers=["", answer(context.asked[0])])
    assert await at_once().design(again) == design


async def test_two_unusable_replies_fail_the_phase():
    context = Context(answers=["no", "no", "yes"])
    with pytest.raises(UnusableAnswer, match="^there is no JSON object"):
        await at_once().design(context)
    assert len(context.asked) == 2


# -- pace, threads and cancellation ------------------------------------------------------------------------------------


async def test_a_phase_lasts_at_least_the_configured_number_of_seconds():
    before = time.monotonic()
    with Stopwatch() as took:
        await ExampleResearch(phase_seconds=0.05).design(Context())
    assert time.monotonic() - before >= 0.05
    assert took.seconds < 2


async def test_a_phase_can_be_cancelled_while_waiting_for_the_minimum_duration():
    context = Context()
    task = asyncio.create_task(ExampleResearch(phase_seconds=3600).design(context))
    await until(lambda: context.asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 2)


@pytest.mark.parametrize("phase", ["train", "backtest"])
async def test_a_cancelled_phase_ends_without_waiting_for_the_computing_thread(phase: str):
    design, training, *_ = await cycle(at_once(), Context())
    context = Endless()
    arguments = (design,) if phase == "train" else (design, training)
    task = asyncio.create_task(getattr(at_once(), phase)(context, *arguments))
    await until(context.entered.is_set)  # the event loop runs while the thread waits
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 2)
    context.go_on.set()
    await asyncio.get_running_loop().shutdown_default_executor()  # waits for the thread
    assert context.pauses == 1, "the thread stops at its next pause"
    assert threading.get_ident() not in context.threads


@pytest.mark.parametrize("phase", ["train", "backtest"])
async def test_the_computing_thread_stops_if_the_context_is_marked_as_cancelled(phase: str):
    design, training, *_ = await cycle(at_once(), Context())
    context = Context()
    context.stop.set()
    arguments = (design,) if phase == "train" else (design, training)
    with pytest.raises(asyncio.CancelledError):
        await getattr(at_once(), phase)(context, *arguments)
    assert threading.get_ident() not in context.threads


# -- invalid arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_invalid_phase_seconds_are_rejected(seconds: float):
    with pytest.raises(InvalidArgument, match="phase_seconds must be a finite number of 0 or more"):
        ExampleResearch(phase_seconds=seconds)


def test_a_price_series_with_too_few_days_is_rejected():
    prices = bundled_prices()
    with pytest.raises(InvalidArgument, match="must have 220 days or more, not 219"):
        ExampleResearch(PriceSeries(prices.days[:219], prices.closes[:219]))


async def test_a_price_series_of_the_minimum_length_is_accepted():
    prices = bundled_prices()
    short = PriceSeries(prices.days[:220], prices.closes[:220])
    *_, backtest, _ = await cycle(at_once(short), Context())
    assert backtest.trades >= 0
