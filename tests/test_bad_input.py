"""Invalid input raises a specific error before a request is sent."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter, InvalidAmount, InvalidArgument
from ktrdr_budget.money import to_units

HUGE = 10**5000  # more digits than Python formats
BUDGETS = [Budget("agent", "5.00")]


class Float(float):
    """A float whose ``repr`` includes the name of the class, as with the floats of NumPy."""

    def __repr__(self) -> str:
        return f"Float({float(self)})"


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("repr fails")


def test_a_float_subclass_is_converted_by_its_value_and_not_by_its_repr():
    assert to_units(Float(0.1)) == 100_000_000
    assert Budget("agent", Float(0.1)).limit == Decimal("0.10")
    with pytest.raises(InvalidAmount):
        to_units(Float("nan"))


@pytest.mark.parametrize("amount", [HUGE, -HUGE, [HUGE], Unshowable(), "9" * 5000, Decimal(HUGE)], ids=type)
@pytest.mark.parametrize("unit", ["usd", "tokens"])
def test_an_amount_that_cannot_be_formatted_is_rejected_with_a_short_message(amount, unit):
    with pytest.raises(InvalidAmount) as refused:
        to_units(amount, unit)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget("agent", 1, timezone=[]),
        lambda: Budget("agent", 1, timezone=HUGE),
        lambda: Budget("agent", 1, period=HUGE),
        lambda: Budget("agent", 1, unit=HUGE),
        lambda: Budget("agent", 1, kind=HUGE),
        lambda: Budget(HUGE, 1),
        lambda: AsyncBudgetLimiter("unix:///missing", ["agent"]),
        lambda: AsyncBudgetLimiter("unix:///missing", BUDGETS[0]),
        lambda: AsyncBudgetLimiter("unix:///missing", None),
        lambda: AsyncBudgetLimiter(data_dir=5),
        lambda: AsyncBudgetLimiter(data_dir=b"data"),
        lambda: AsyncBudgetLimiter("unix:///missing", timeout=HUGE),
        lambda: AsyncBudgetLimiter("unix:///missing", on_store_error=HUGE),
        lambda: AsyncBudgetLimiter("unix:///missing", max_holds=HUGE),
        lambda: AsyncBudgetLimiter("unix:///missing", tenant=HUGE),
        lambda: AsyncBudgetLimiter("unix:///missing", durability=HUGE),
        lambda: AsyncBudgetLimiter(5),
    ],
)
def test_an_invalid_constructor_argument_is_rejected(make):
    with pytest.raises(InvalidArgument):
        make()


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory):
    """A limiter with an unreachable store."""
    with BudgetLimiter(f"unix://{tmp_path_factory.mktemp('n')}/missing", BUDGETS, timeout=0.1) as made:
        yield made


@pytest.mark.parametrize(
    "call",
    [
        lambda limiter: limiter.reserve("agent", HUGE),
        lambda limiter: limiter.reserve("agent", 1, id=HUGE),
        lambda limiter: limiter.reserve("agent", 1, ttl=HUGE),
        lambda limiter: limiter.reserve("agent", 1, on_expiry=HUGE),
        lambda limiter: limiter.reserve("agent", 1, operation="\ud800"),
        lambda limiter: limiter.reserve("agent", 1, owner="\ud800"),
        lambda limiter: limiter.reserve(HUGE, 1),
        lambda limiter: limiter.record("agent", 1, operation="\ud800"),
        lambda limiter: limiter.record("agent", HUGE),
        lambda limiter: limiter.commit("op_1", HUGE),
        lambda limiter: limiter.commit(HUGE),
        lambda limiter: limiter.extend("op_1", HUGE),
        lambda limiter: limiter.set_limit("agent", 1, until="garbage"),
        lambda limiter: limiter.set_limit("agent", 1, until=HUGE),
        lambda limiter: limiter.set_limit("agent", HUGE),
        lambda limiter: limiter.ledger("agent", cursor="garbage"),
        lambda limiter: limiter.ledger("agent", cursor=HUGE),
        lambda limiter: limiter.ledger("agent", window=5),
        lambda limiter: limiter.ledger("agent", window=HUGE),
        lambda limiter: limiter.ledger("agent", limit=HUGE),
        lambda limiter: limiter.holds("agent", cursor="garbage"),
        lambda limiter: limiter.holds("agent", limit=HUGE),
    ],
)
def test_a_call_with_an_invalid_argument_is_rejected_before_a_request_is_sent(unreachable, call):
    with pytest.raises(InvalidArgument):
        call(unreachable)
