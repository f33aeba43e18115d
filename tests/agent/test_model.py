"""The logistic regression: fitting, and its figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget.agent.model import Model, accuracy, fit, log_loss


def go_on() -> None:
    """A pause callback that never stops the training."""


def fitted(rows, labels, *, rate: float = 0.5, epochs: int = 100) -> Model:
    return fit(rows, labels, learning_rate=rate, epochs=epochs, pause=go_on)


def test_one_step_of_gradient_descent_matches_values_computed_by_hand():
    # Scaled, the feature is -1 and 1; all probabilities are 1/2, so the gradient is mean(-0.5 * 1, 0.5 * -1) = -0.5.
    model = fitted([(1.0,), (3.0,)], [0, 1], rate=0.4, epochs=1)
    assert (model.means, model.deviations) == ((2.0,), (1.0,))
    assert model.weights == pytest.approx((0.2,))
    assert model.bias == pytest.approx(0)
    assert model.chances([(3.0,)]) == pytest.approx([1 / (1 + math.exp(-0.2))])


def test_the_model_learns_a_separable_pattern():
    rows = [(float(x), 0.5) for x in range(-20, 21)]
    labels = [int(row[0] > 0) for row in rows]
    model = fitted(rows, labels)
    chances = model.chances(rows)
    assert accuracy(chances, labels) > 0.95
    assert log_loss(chances, labels) < 0.3
    assert chances == sorted(chances)


def test_an_untrained_model_predicts_one_half():
    assert fitted([(1.0,), (3.0,)], [0, 1], epochs=0).chances([(100.0,), (-100.0,)]) == [0.5, 0.5]


def test_training_on_the_same_data_gives_the_same_model():
    rows, labels = [(math.sin(n), math.cos(3 * n)) for n in range(60)], [n % 3 // 2 for n in range(60)]
    assert fitted(rows, labels) == fitted(rows, labels)


def test_accuracy_and_loss_match_values_computed_by_hand():
    assert accuracy([0.9, 0.6, 0.5, 0.2], [1, 0, 1, 0]) == 0.5
    assert log_loss([0.8, 0.4], [1, 0]) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)
    assert log_loss([0.5] * 3, [0, 1, 1]) == pytest.approx(math.log(2))


def test_the_loss_of_a_wrong_prediction_made_with_certainty_is_finite():
    assert 20 < log_loss([1.0], [0]) < 30


def test_the_pause_callback_runs_before_each_training_pass_and_can_stop_the_training():
    passes = []

    def pause() -> None:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit([(1.0,), (3.0,)], [0, 1], learning_rate=0.1, epochs=100, pause=pause)
    assert len(passes) == 3


@given(
    data=st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1, 1), st.booleans()), min_size=2, max_size=20),
    elsewhere=st.floats(allow_nan=False, allow_infinity=False),
)
def test_predictions_are_between_0_and_1_for_any_data(data, elsewhere: float):
    model = fitted([(a, b) for a, b, _ in data], [int(rose) for *_, rose in data], epochs=20)
    for chance in model.chances([(elsewhere, elsewhere)]):
        assert 0 <= chance <= 1
