"""Prompts of the bundled research, and parsers of the replies.

A reply contains one JSON object. Text around the object is ignored. An error names the defect, and never quotes the
reply.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ktrdr_budget.agent.phases import Assessment, Backtest, Design, Training
from ktrdr_budget.agent.strategies import STRATEGIES, Number
from ktrdr_budget.agent.trading import TRADING_COST
from ktrdr_budget.errors import BudgetError

__all__ = [
    "SYSTEM",
    "VERDICTS",
    "UnusableAnswer",
    "assessment_prompt",
    "brief_of",
    "design_prompt",
    "figures_of",
    "parse_assessment",
    "parse_design",
    "strategies_of",
]

SYSTEM = "You are a careful quantitative researcher. Answer with one JSON object and nothing else."
VERDICTS = ("promising", "mediocre", "poor")
SUMMARY_LENGTH_MAX = 1000
_STRATEGIES = "Strategies: "
_FIGURES = "Figures: "
_BRIEF = "Brief: "


class UnusableAnswer(BudgetError):
    """A reply of the language model is unusable."""


# -- designing ---------------------------------------------------------------------------------------------------------


def design_prompt(operation_id: str, brief: str | None = None) -> str:
    """Return the prompt for a design. The id makes the choices of cycles differ. A brief guides the choice."""
    described = {
        name: {"description": strategy.description, "parameters": {key: list(ends) for key, ends in ranges.items()}}
        for name, strategy in STRATEGIES.items()
        for ranges in [strategy.ranges]
    }
    return "\n".join(
        (
            f"Research cycle {operation_id}: choose a trading strategy to try on the daily closes of one instrument.",
            "A logistic regression will predict whether the price rises on the next day, from what the strategy looks",
            "at. Parameters ending in _days are the lengths of the windows of those features, threshold is the chance",
            "of a rise above which the strategy buys, learning_rate and epochs are those of the regression,",
            f"target_volatility is annual. Buying and selling cost {TRADING_COST:.2%} each.",
            "Choose one strategy, and a value for each of its parameters between the lowest and highest given; whole",
            "numbers where both are. Other cycles try other choices: let the id decide where nothing else does.",
            _STRATEGIES + json.dumps(described),
            *_brief_lines(brief),
            'Answer: {"strategy": NAME, "parameters": {NAME: NUMBER, ...}, "rationale": TWO SENTENCES}',
        )
    )


def _brief_lines(brief: str | None) -> tuple[str, ...]:
    # As JSON, so that a line of the brief cannot pass as a line of the prompt.
    return () if brief is None else ("Follow this brief as far as it allows:", _BRIEF + json.dumps({"text": brief}))


def brief_of(prompt: str) -> str | None:
    """Return the brief in a design prompt, or ``None`` if the prompt has no brief."""
    found = _line_of(prompt, _BRIEF)
    return None if found is None else str(found["text"])


def strategies_of(prompt: str) -> Mapping[str, Any] | None:
    """Return the strategies in a design prompt, or ``None`` for any other prompt."""
    return _line_of(prompt, _STRATEGIES)


def parse_design(text: str) -> Design:
    """Parse the design in a reply.

    Raises:
        UnusableAnswer: the reply has no design, or a parameter is missing or out of range.
    """
    answer = _object_in(text, "strategy")
    strategy = STRATEGIES.get(answer["strategy"]) if isinstance(answer["strategy"], str) else None
    if strategy is None:
        raise UnusableAnswer(f"strategy must be one of {', '.join(STRATEGIES)}")
    given = answer.get("parameters")
    if not isinstance(given, dict):
        raise UnusableAnswer("parameters must be an object")
    parameters = {name: _within(name, given.get(name), *ends) for name, ends in strategy.ranges.items()}
    return Design(strategy.name, parameters)


def _within(name: str, value: object, lowest: Number, highest: Number) -> Number:
    whole = isinstance(lowest, int) and isinstance(highest, int)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= highest:
        raise UnusableAnswer(f"parameter {name} must be a number from {lowest} to {highest}")
    if whole and value != int(value):
        raise UnusableAnswer(f"parameter {name} must be a whole number from {lowest} to {highest}")
    return int(value) if whole else float(value)


# -- assessing ---------------------------------------------------------------------------------------------------------


def assessment_prompt(design: Design, training: Training, backtest: Backtest) -> str:
    """Return the prompt for an assessment of the figures."""
    figures = {
        "accuracy": round(training.accuracy, 4),
        "initial_loss": round(training.initial_loss, 4),
        "final_loss": round(training.final_loss, 4),
        "win_rate": round(backtest.win_rate, 4),
        "max_drawdown": round(backtest.max_drawdown, 4),
        "sharpe_ratio": round(backtest.sharpe_ratio, 3),
        "trades": backtest.trades,
    }
    return "\n".join(
        (
            f"A trading strategy, {design.strategy_name}, was trained and backtested on daily closes.",
            f"Parameters: {json.dumps(dict(design.parameters), default=str)}",
            "accuracy and losses (log loss; guessing is 0.693) are of days between those trained on and those traded;",
            "win_rate is the share of trades with a profit, max_drawdown the deepest fall from a peak as a part of it,",
            "sharpe_ratio is annual, after costs, out of sample.",
            _FIGURES + json.dumps(figures),
            "Judge it soberly: few trades prove little, a high accuracy with a poor ratio is worth nothing, and a deep",
            "fall cannot be borne. Say what speaks for it, what against it, and what to try next.",
            f'Answer: {{"verdict": ONE OF {", ".join(VERDICTS)}, "summary": THREE SENTENCES}}',
        )
    )


def figures_of(prompt: str) -> Mapping[str, Any] | None:
    """Return the figures in an assessment prompt, or ``None`` for any other prompt."""
    return _line_of(prompt, _FIGURES)


def parse_assessment(text: str) -> Assessment:
    """Parse the assessment in a reply.

    Raises:
        UnusableAnswer: the reply has no assessment.
    """
    answer = _object_in(text, "verdict")
    verdict, summary = answer["verdict"], answer.get("summary")
    if not isinstance(verdict, str) or verdict.strip().lower() not in VERDICTS:
        raise UnusableAnswer(f"verdict must be one of {', '.join(VERDICTS)}")
    if not isinstance(summary, str) or not summary.strip():
        raise UnusableAnswer("summary must be a string")
    return Assessment(verdict.strip().lower(), summary.strip()[:SUMMARY_LENGTH_MAX])


# -- JSON within text --------------------------------------------------------------------------------------------------


def _object_in(text: str, key: str) -> dict[str, Any]:
    """Return the first JSON object in the text that has the key."""
    decoder = json.JSONDecoder(parse_constant=lambda _: math.nan)
    start = text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(found, dict) and key in found:
                return found
        start = text.find("{", end)
    raise UnusableAnswer(f"there is no JSON object with {key!r} in it")


def _line_of(prompt: str, start: str) -> Mapping[str, Any] | None:
    for line in prompt.splitlines():
        if line.startswith(start):
            try:
                found = json.loads(line.removeprefix(start))
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None
