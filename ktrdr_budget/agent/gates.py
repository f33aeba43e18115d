"""Gates: checks between the phases of a cycle. Each check compares figures, and calls no language model."""

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
    """Minimum figures that a cycle must reach to continue. A figure equal to its threshold passes.

    Raises:
        InvalidArgument: a threshold is not a finite number.
    """

    min_accuracy: float = 0.10
    max_loss: float = 0.8
    min_loss_decrease: float = -0.5
    """The minimum decrease of the loss, as a fraction of the initial loss. A negative value allows a rise."""
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
        """Read ``TRAINING_GATE_*`` and ``BACKTEST_GATE_*``. If a variable is not set, its threshold is the default.

        Raises:
            InvalidArgument: a variable is not a finite number. The message names the variable.
        """
        texts = {name: environment.get(variable, "").strip() for name, variable in _VARIABLES.items()}
        return cls(**{name: _number(text, _VARIABLES[name]) for name, text in texts.items() if text})


@dataclass(frozen=True, slots=True)
class GateResult:
    """The decision of a gate."""

    gate: Gate
    passed: bool
    reason: str
    """The failed checks with their figures. If all checks passed, all checks with their figures."""


def training_gate(training: Training, thresholds: Thresholds) -> GateResult:
    """Check whether the trained model is good enough for a backtest. A non-finite figure fails."""
    checks = (
        _at_least("accuracy", training.accuracy, thresholds.min_accuracy),
        _at_most("final loss", training.final_loss, thresholds.max_loss),
        _at_least("loss decrease", training.loss_decrease, thresholds.min_loss_decrease),
    )
    return _result("training", checks)


def backtest_gate(backtest: Backtest, thresholds: Thresholds) -> GateResult:
    """Check whether the strategy traded well enough for an assessment. A non-finite figure fails."""
    checks = (
        _at_least("win rate", backtest.win_rate, thresholds.min_win_rate),
        _at_most("maximum drawdown", backtest.max_drawdown, thresholds.max_drawdown),
        _at_least("Sharpe ratio", backtest.sharpe_ratio, thresholds.min_sharpe),
    )
    return _result("backtest", checks)


@dataclass(frozen=True, slots=True)
class _Check:
    passed: bool
    text: str


def _at_least(name: str, figure: float, threshold: float) -> _Check:
    figure = float(figure)  # numbers of some libraries do not compare to a plain bool
    passed = math.isfinite(figure) and figure >= threshold
    return _Check(passed, _describe(name, figure, ">=" if passed else "<", threshold))


def _at_most(name: str, figure: float, threshold: float) -> _Check:
    figure = float(figure)
    passed = math.isfinite(figure) and figure <= threshold
    return _Check(passed, _describe(name, figure, "<=" if passed else ">", threshold))


def _describe(name: str, figure: float, relation: str, threshold: float) -> str:
    if not math.isfinite(figure):
        return f"{name} is not finite ({figure})"
    shown, limit = f"{figure:.4g}", f"{threshold:.4g}"
    # Two different figures must not look equal.
    return f"{name} {figure!r} {relation} {threshold!r}" if shown == limit else f"{name} {shown} {relation} {limit}"


def _result(gate: Gate, checks: Iterable[_Check]) -> GateResult:
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
