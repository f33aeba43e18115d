from decimal import Decimal

import pytest

from ktrdr_budget import Budget, BudgetExceeded
from ktrdr_budget.testing import MemoryLimiter


def answer(limiter, question):  # your code
    with limiter.hold("agent", "0.15") as hold:
        hold.accrue("0.07")
        return question.replace("?", ".")


@pytest.fixture
def limiter():
    with MemoryLimiter([Budget("agent", limit="0.20")]) as limiter:
        yield limiter


def test_an_answer_costs_seven_cents(limiter):
    assert answer(limiter, "Why?") == "Why."
    assert limiter.status("agent").spent == Decimal("0.07")


def test_a_question_is_denied_if_the_budget_is_too_small(limiter):
    limiter.record("agent", "0.10")
    with pytest.raises(BudgetExceeded):
        answer(limiter, "Why?")
    assert limiter.status("agent").spent == Decimal("0.10")
