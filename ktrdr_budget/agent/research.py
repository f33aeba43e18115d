"""The bundled research: a real cycle that takes seconds, and needs neither a key nor additional packages.

The price series has three parts. The model is fitted to the first part, validated on the second part and traded on the
third part, so every figure is out of sample.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TypeVar

from ktrdr_budget.agent import model as models
from ktrdr_budget.agent import prompts
from ktrdr_budget.agent.market import PriceSeries, bundled_prices
from ktrdr_budget.agent.model import Model
from ktrdr_budget.agent.phases import Assessment, Backtest, Design, PhaseContext, Training
from ktrdr_budget.agent.strategies import STRATEGIES, WARM_UP_DAYS, features, positions
from ktrdr_budget.agent.trading import Account, figures, trade
from ktrdr_budget.errors import InvalidArgument

__all__ = ["ExampleResearch"]

PHASE_SECONDS_DEFAULT = 1.0
FITTED_PART, MEASURED_PART = 0.5, 0.2
"""The fractions of the days for the fit and for the validation. The remaining days are traded."""
DAYS_MIN = WARM_UP_DAYS + 100

Answer = TypeVar("Answer")
Result = TypeVar("Result")
Pause = Callable[[], None]


class ExampleResearch:
    """Implements :class:`~ktrdr_budget.agent.phases.Research` on one price series.

    Args:
        prices: the price series. Default: the bundled series.
        phase_seconds: the minimum duration of each phase. It makes a cycle slow enough to watch.

    Raises:
        InvalidArgument: the series is too short, or ``phase_seconds`` is negative or not finite.
    """

    def __init__(self, prices: PriceSeries | None = None, *, phase_seconds: float = PHASE_SECONDS_DEFAULT) -> None:
        if not math.isfinite(phase_seconds) or phase_seconds < 0:
            raise InvalidArgument(f"phase_seconds must be a finite number of 0 or more, not {phase_seconds!r}")
        self._prices = bundled_prices() if prices is None else prices
        if len(self._prices) < DAYS_MIN:
            raise InvalidArgument(f"the price series must have {DAYS_MIN} days or more, not {len(self._prices)}")
        self._phase_seconds = phase_seconds

    async def design(self, context: PhaseContext) -> Design:
        """Let the language model choose a strategy of :data:`~ktrdr_budget.agent.strategies.STRATEGIES`.

        Raises:
            UnusableAnswer: two replies were unusable.
        """
        async with self._paced():
            return await _ask(context, prompts.design_prompt(context.operation_id, context.brief), prompts.parse_design)

    def known_design(self, strategy: str) -> Design:
        """Return the named strategy with each parameter in the middle of its range.

        Raises:
            InvalidArgument: the strategy does not exist.
        """
        found = STRATEGIES.get(strategy)
        if found is None:
            raise InvalidArgument(f"there is no strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
        return Design(found.name, found.middle)

    async def train(self, context: PhaseContext, design: Design) -> Training:
        """Fit the model to the first part of the series, and validate the model on the second part."""
        async with self._paced():
            return await _in_thread(context, lambda pause: self._train(design, pause))

    async def backtest(self, context: PhaseContext, design: Design, training: Training) -> Backtest:
        """Trade the third part of the series."""
        async with self._paced():
            return await _in_thread(context, lambda pause: figures(self._trade(design, training.model, pause)))

    async def assess(self, context: PhaseContext, design: Design, training: Training, backtest: Backtest) -> Assessment:
        """Let the language model judge the figures.

        Raises:
            UnusableAnswer: two replies were unusable.
        """
        async with self._paced():
            return await _ask(context, prompts.assessment_prompt(design, training, backtest), prompts.parse_assessment)

    # -- computation, in a thread --------------------------------------------------------------------------------------

    def _train(self, design: Design, pause: Pause) -> Training:
        closes = self._prices.closes
        rows = features(closes, design.parameters, pause)
        # The last day has no label: its next close is unknown.
        labels = [int(later > earlier) for earlier, later in pairwise(closes[WARM_UP_DAYS:])]
        fitted, measured = self._parts()
        model = models.fit(
            rows[:fitted],
            labels[:fitted],
            learning_rate=float(design.parameters["learning_rate"]),
            epochs=int(design.parameters["epochs"]),
            pause=pause,
        )
        seen, truth = rows[fitted:measured], labels[fitted:measured]
        chances = model.chances(seen)
        return Training(
            accuracy=models.accuracy(chances, truth),
            initial_loss=models.log_loss([0.5] * len(truth), truth),
            final_loss=models.log_loss(chances, truth),
            model=model,
        )

    def _trade(self, design: Design, model: Model, pause: Pause) -> Account:
        closes = self._prices.closes
        first = WARM_UP_DAYS + self._parts()[1]
        chances = model.chances(features(closes, design.parameters, pause, first))
        held = positions(STRATEGIES[design.strategy_name], design.parameters, closes, chances)
        # A position earns from its close to the next close. The last position has no next close, so it earns nothing.
        returns = [later / earlier - 1 for earlier, later in pairwise(closes[first:])]
        return trade(held[:-1], returns)

    def _parts(self) -> tuple[int, int]:
        """Return the end of the fitted part and the end of the validated part, in days after the warm-up."""
        days = len(self._prices) - WARM_UP_DAYS
        return round(days * FITTED_PART), round(days * (FITTED_PART + MEASURED_PART))

    # -- pace ----------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _paced(self) -> AsyncIterator[None]:
        """Extend a phase to at least ``phase_seconds``, if the phase neither fails nor is cancelled."""
        ends = time.monotonic() + self._phase_seconds
        yield
        await asyncio.sleep(max(0.0, ends - time.monotonic()))


class _Stopped(Exception):
    """The work in a thread was cancelled."""


async def _in_thread(context: PhaseContext, work: Callable[[Pause], Result]) -> Result:
    """Run the work in a thread. If the call is cancelled, the call ends at once; the thread ends at its next pause."""
    abandoned = threading.Event()

    def pause() -> None:
        if abandoned.is_set() or context.cancelled:
            raise _Stopped
        time.sleep(0)  # yields the interpreter to the event loop

    try:
        return await asyncio.to_thread(work, pause)
    except _Stopped:
        raise asyncio.CancelledError from None
    finally:
        abandoned.set()


async def _ask(context: PhaseContext, prompt: str, parse: Callable[[str], Answer]) -> Answer:
    """Send a prompt. If the reply is unusable, send the prompt once more, with the reason."""
    first = await context.ask(prompt, system=prompts.SYSTEM)
    try:
        return parse(first.text)
    except prompts.UnusableAnswer as error:
        again = f"{prompt}\nAn earlier answer could not be used: {error}."
    return parse((await context.ask(again, system=prompts.SYSTEM)).text)
