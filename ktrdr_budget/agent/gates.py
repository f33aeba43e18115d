"""Gates: deterministic checks between phases, which no language model can talk its way through."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from ktrdr_budget.agent.phases import Backtest, Training
from ktrdr_budget.errors import InvalidArgument

__all__ = ["GateResult", "Thresholds", "backtest_gate", "training_gate"]

Gate = Literal["training", "backtest"]

_VARIABLES = {
    "min_accuracy": "TRAINING_GATE_MIN_ACCURACY",
    "max_loss": "TRAINING_GATE_MAX_LOSS",
    "min_loss_decrease": "TRAINING_GATE_MIN_LOSS_DECREASE",
    "min_win_rate": "BACKTEST_GATE_MIN_WIN_RATE",
    "max_drawdown": "BACKTEST_GATE_MAX_DRAWDOWN",
    "min_sharpe": "BACKTEST_GATE_MIN_SHARPE",
}


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a cycle must reach to go on. A figure that equals its threshold passes.

    Raises:
        InvalidArgument: a threshold is not a finite number.
    """

    min_accuracy: float = 0.10
    max_loss: float = 0.8
    min_loss_decrease: float = -0.5
    """As a part of the first loss; negative allows a rise."""
    min_win_rate: float = 0.10
    max_drawdown: float = 0.4
    min_sharpe: float = -0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InvalidArgument(f"{field.name} must be a finite number, not {value!r}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Thresholds:
        """The thresholds of ``TRAINING_GATE_*`` and ``BACKTEST_GATE_*``; those not set have their defaults.

        Raises:
            InvalidArgument: a variable, which the message names, is not a finite number.
        """
        texts = {name: environment.get(variable, "").strip() for name, variable in _VARIABLES.items()}
        return cls(**{name: _number(text, _VARIABLES[name]) for name, text in texts.items() if text})


@dataclass(frozen=True, slots=True)
class GateResult:
    """What a gate said."""

    gate: Gate
    passed: bool
    reason: str
    """The checks that failed with their figures, or all of them if all passed."""


def training_gate(training: Training, thresholds: Thresholds) -> GateResult:
    """Whether the model learned enough to be worth a backtest. A figure that is not finite fails."""
    checks = (
        _at_least("accuracy", training.accuracy, thresholds.min_accuracy),
        _at_most("final loss", training.final_loss, thresholds.max_loss),
        _at_least("loss decrease", training.loss_decrease, thresholds.min_loss_decrease),
    )
    return _judged("training", checks)


def backtest_gate(backtest: Backtest, thresholds: Thresholds) -> GateResult:
    """Whether the strategy traded well enough to be worth an assessment. A figure that is not finite fails."""
    checks = (
        _at_least("win rate", backtest.win_rate, thresholds.min_win_rate),
        _at_most("maximum drawdown", backtest.max_drawdown, thresholds.max_drawdown),
        _at_least("Sharpe ratio", backtest.sharpe_ratio, thresholds.min_sharpe),
    )
    return _judged("backtest", checks)


@dataclass(frozen=True, slots=True)
class _Check:
    passed: bool
    text: str


def _at_least(name: str, figure: float, threshold: float) -> _Check:
    figure = float(figure)  # numbers of some libraries compare to truths of their own
    passed = math.isfinite(figure) and figure >= threshold
    return _Check(passed, _told(name, figure, ">=" if passed else "<", threshold))


def _at_most(name: str, figure: float, threshold: float) -> _Check:
    figure = float(figure)
    passed = math.isfinite(figure) and figure <= threshold
    return _Check(passed, _told(name, figure, "<=" if passed else ">", threshold))


def _told(name: str, figure: float, relation: str, threshold: float) -> str:
    if not math.isfinite(figure):
        return f"{name} is not finite ({figure})"
    shown, limit = f"{figure:.4g}", f"{threshold:.4g}"
    # Two figures that differ must not read alike.
    return f"{name} {figure!r} {relation} {threshold!r}" if shown == limit else f"{name} {shown} {relation} {limit}"


def _judged(gate: Gate, checks: Iterable[_Check]) -> GateResult:
    failed = [check for check in checks if not check.passed]
    return GateResult(gate, not failed, ", ".join(check.text for check in failed or checks))


def _number(text: str, variable: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidArgument(f"{variable}: must be a finite number, not {text!r}")
    return number
