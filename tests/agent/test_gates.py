"""Gates: passing, failing, and the reasons that they give."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget import InvalidAmount
from ktrdr_budget.agent.gates import Thresholds, backtest_gate, training_gate
from ktrdr_budget.agent.phases import Backtest, Training
from ktrdr_budget.errors import InvalidArgument

GOOD = Training(accuracy=0.53, initial_loss=0.7, final_loss=0.65)
FINE = Backtest(win_rate=0.4, max_drawdown=0.2, sharpe_ratio=0.9, trades=12)
VARIABLES = {
    "min_accuracy": "TRAINING_GATE_MIN_ACCURACY",
    "max_loss": "TRAINING_GATE_MAX_LOSS",
    "min_loss_decrease": "TRAINING_GATE_MIN_LOSS_DECREASE",
    "min_win_rate": "BACKTEST_GATE_MIN_WIN_RATE",
    "max_drawdown": "BACKTEST_GATE_MAX_DRAWDOWN",
    "min_sharpe": "BACKTEST_GATE_MIN_SHARPE",
}
# Each figure of a gate: field of the record, name in the reason, threshold, and the failing side.
TRAINING_CHECKS = (("accuracy", "accuracy", "min_accuracy", -1), ("final_loss", "final loss", "max_loss", 1))
BACKTEST_CHECKS = (
    ("win_rate", "win rate", "min_win_rate", -1),
    ("max_drawdown", "maximum drawdown", "max_drawdown", 1),
    ("sharpe_ratio", "Sharpe ratio", "min_sharpe", -1),
)
numbers = st.floats(allow_nan=True, allow_infinity=True)
finite = st.floats(-1e6, 1e6)


def test_the_default_thresholds_equal_the_documented_values():
    assert Thresholds() == Thresholds(
        min_accuracy=0.10,
        max_loss=0.8,
        min_loss_decrease=-0.5,
        min_win_rate=0.10,
        max_drawdown=0.4,
        min_sharpe=-0.5,
    )
    assert Thresholds.from_environment({}) == Thresholds()


@pytest.mark.parametrize(("field", "variable"), VARIABLES.items())
def test_each_threshold_can_be_set_by_an_environment_variable(field: str, variable: str):
    assert Thresholds.from_environment({variable: " 0.25 "}) == replace(Thresholds(), **{field: 0.25})
    assert Thresholds.from_environment({variable: "  "}) == Thresholds()


@pytest.mark.parametrize("text", ["high", "0,5", "nan", "inf", "-inf", "1e999", "50%"])
@pytest.mark.parametrize("variable", VARIABLES.values())
def test_the_error_names_a_threshold_variable_that_is_not_a_number(variable: str, text: str):
    with pytest.raises(InvalidArgument, match=f"^{variable}: must be a finite number, not '{text}'$") as raised:
        Thresholds.from_environment({variable: text})
    assert not isinstance(raised.value, InvalidAmount)


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.5", None])
def test_a_threshold_other_than_a_finite_number_is_rejected(value: object):
    with pytest.raises(InvalidArgument, match="^max_loss must be a finite number"):
        Thresholds(max_loss=value)


def test_the_reason_of_a_passed_gate_shows_every_figure():
    passed = training_gate(GOOD, Thresholds())
    assert (passed.gate, passed.passed) == ("training", True)
    assert passed.reason == "accuracy 0.53 >= 0.1, final loss 0.65 <= 0.8, loss decrease 0.07143 >= -0.5"
    passed = backtest_gate(FINE, Thresholds())
    assert (passed.gate, passed.passed) == ("backtest", True)
    assert passed.reason == "win rate 0.4 >= 0.1, maximum drawdown 0.2 <= 0.4, Sharpe ratio 0.9 >= -0.5"


def test_the_reason_of_a_failed_gate_shows_only_the_failed_figures():
    failed = training_gate(replace(GOOD, accuracy=0.05), Thresholds())
    assert (failed.gate, failed.passed, failed.reason) == ("training", False, "accuracy 0.05 < 0.1")
    failed = backtest_gate(replace(FINE, max_drawdown=0.55, sharpe_ratio=-0.81), Thresholds())
    assert not failed.passed
    assert failed.reason == "maximum drawdown 0.55 > 0.4, Sharpe ratio -0.81 < -0.5"


def test_the_training_gate_fails_if_the_loss_rose_too_much():
    failed = training_gate(Training(accuracy=0.5, initial_loss=0.4, final_loss=0.7), Thresholds())
    assert failed.reason == "loss decrease -0.75 < -0.5"
    assert training_gate(Training(accuracy=0.5, initial_loss=0.4, final_loss=0.6), Thresholds()).passed


def test_a_gate_passes_if_a_figure_equals_the_threshold():
    edge = Thresholds(min_accuracy=0.53, max_loss=0.65, min_loss_decrease=GOOD.loss_decrease)
    assert training_gate(GOOD, edge).passed
    assert backtest_gate(FINE, Thresholds(min_win_rate=0.4, max_drawdown=0.2, min_sharpe=0.9)).passed


def test_a_figure_close_to_its_threshold_is_not_rounded_to_the_threshold():
    failed = training_gate(replace(GOOD, accuracy=0.0999999), Thresholds())
    assert failed.reason == "accuracy 0.0999999 < 0.1"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gate_fails_if_a_figure_is_not_finite(bad: float):
    for field, word, _, _ in TRAINING_CHECKS:
        failed = training_gate(replace(GOOD, **{field: bad}), Thresholds())
        assert not failed.passed
        assert f"{word} is not finite ({bad})" in failed.reason
    assert "loss decrease is not finite" in training_gate(replace(GOOD, initial_loss=bad), Thresholds()).reason
    for field, word, _, _ in BACKTEST_CHECKS:
        failed = backtest_gate(replace(FINE, **{field: bad}), Thresholds())
        assert (failed.passed, failed.reason) == (False, f"{word} is not finite ({bad})")


@given(accuracy=numbers, loss=numbers, min_accuracy=finite, max_loss=finite)
def test_the_training_gate_passes_if_and_only_if_all_figures_meet_the_thresholds(
    accuracy, loss, min_accuracy, max_loss
):
    thresholds = Thresholds(min_accuracy=min_accuracy, max_loss=max_loss, min_loss_decrease=-1e300)
    training = Training(accuracy=accuracy, initial_loss=1.0, final_loss=loss)
    result = training_gate(training, thresholds)
    right = (math.isfinite(accuracy) and accuracy >= min_accuracy, math.isfinite(loss) and loss <= max_loss)
    named = ("accuracy" in result.reason, "final loss" in result.reason)
    decrease_is_fine = math.isfinite(1.0 - loss) and 1.0 - loss >= -1e300
    assert result.passed == (all(right) and decrease_is_fine)
    assert named == ((True, True) if result.passed else (not right[0], not right[1]))
    assert result == training_gate(training, thresholds)


@given(figures=st.tuples(numbers, numbers, numbers), limits=st.tuples(finite, finite, finite))
def test_the_backtest_gate_passes_if_and_only_if_all_figures_meet_the_thresholds(figures, limits):
    fields = {field: figure for (field, *_), figure in zip(BACKTEST_CHECKS, figures, strict=True)}
    thresholds = Thresholds(**{name: limit for (_, _, name, _), limit in zip(BACKTEST_CHECKS, limits, strict=True)})
    result = backtest_gate(Backtest(**fields, trades=1), thresholds)
    wrong = {
        word
        for (_, word, _, side), figure, limit in zip(BACKTEST_CHECKS, figures, limits, strict=True)
        if not math.isfinite(figure) or (figure - limit) * side > 0
    }
    assert result.passed == (not wrong)
    named = {word for _, word, _, _ in BACKTEST_CHECKS if word in result.reason}
    assert named == (wrong or {"win rate", "maximum drawdown", "Sharpe ratio"})


@given(training=st.builds(Training, accuracy=finite, initial_loss=finite, final_loss=finite), stricter=st.floats(0, 10))
def test_the_default_thresholds_accept_every_training_result_that_stricter_thresholds_accept(
    training: Training, stricter: float
):
    strict = Thresholds(min_accuracy=0.1 + stricter, max_loss=0.8 - stricter, min_loss_decrease=-0.5 + stricter)
    assert not training_gate(training, strict).passed or training_gate(training, Thresholds()).passed
