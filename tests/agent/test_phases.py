"""The decrease of the loss in a training record, and the protocol of objects that know strategies by name."""

from __future__ import annotations

import pytest

from ktrdr_budget.agent.phases import Design, KnowsStrategies, Training


@pytest.mark.parametrize(
    ("initial", "final", "decrease"), [(0.8, 0.6, 0.25), (0.5, 0.5, 0.0), (0.5, 0.75, -0.5), (0.0, 0.7, 0.0)]
)
def test_the_decrease_of_the_loss_is_a_fraction_of_the_initial_loss(initial, final, decrease):
    assert Training(0.5, initial, final).loss_decrease == pytest.approx(decrease)


def test_an_object_with_the_method_known_design_satisfies_the_strategies_protocol():
    class Library:
        def known_design(self, strategy: str) -> Design:
            return Design(strategy)

    assert isinstance(Library(), KnowsStrategies)
    assert not isinstance(object(), KnowsStrategies)
