"""Budgets and strategies for random histories: amounts, ids, instants."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from hypothesis import strategies as st

from .reference import BudgetModel

BUDGETS = [
    BudgetModel("agent"),
    BudgetModel("team:quant", period="week", timezone="America/New_York"),
    BudgetModel("hourly", period="hour"),
    BudgetModel("lifetime", period="ever"),
    BudgetModel("open-ended", timezone="Pacific/Auckland"),
    BudgetModel("cycles", unit="cycles", timezone="Africa/Cairo"),
    BudgetModel("tokens", unit="tokens", period="month", timezone="Asia/Kathmandu"),
    BudgetModel("gpu", unit="slots", period="ever", slots=True),
]
BY_NAME = {budget.name: budget for budget in BUDGETS}
UNCAPPED = "open-ended"

STARTS = [
    datetime(2026, 11, 23, 12, 0, 0, 300_000, tzinfo=UTC),
    datetime(2026, 11, 1, 3, 59, 30, 300_000, tzinfo=UTC),  # New York: clocks go back in two hours
    datetime(2026, 3, 7, 23, 59, 30, 300_000, tzinfo=UTC),  # New York: clocks go forward on this Sunday
    datetime(2026, 4, 23, 21, 30, 0, 300_000, tzinfo=UTC),  # Cairo skips its next midnight
    datetime(2026, 10, 29, 20, 30, 0, 300_000, tzinfo=UTC),  # Cairo repeats the hour before midnight
    datetime(2026, 4, 4, 10, 59, 0, 300_000, tzinfo=UTC),  # Auckland: a day of 25 hours begins
    datetime(2026, 12, 31, 23, 59, 0, 300_000, tzinfo=UTC),
    datetime(2028, 2, 29, 23, 50, 0, 300_000, tzinfo=UTC),
]
LARGEST_USD = Decimal(2**53 - 1) / 10**9

usd_limits = st.sampled_from([None, 0, "0.30", "1.00", "5.00", "0.0000000015", 3, 2.5, LARGEST_USD])
count_limits = st.sampled_from([None, 0, 1, 3, 10, "20", 2**53 - 1])

usd_amounts = st.one_of(
    st.sampled_from(["0.15", "0.10", 0.1, "0.05", 1, "1.00", "0.30", "5.00", Decimal("2.5")]),
    st.sampled_from(["0.0000001", "0.0000000001", "1e-9", "0.3333333333", 1e-7]),
    st.integers(1, 6 * 10**9).map(lambda nanos: Decimal(nanos) / 10**9),
    st.sampled_from([LARGEST_USD, "4503599.627370496", 12, "100"]),
)
count_amounts = st.sampled_from([1, 1, 2, 3, "4", 10, Decimal(7), 5.0, 2**52, 2**53 - 1])


def amount_for(name: str, *, zero: bool = False):
    """A strategy for amounts of this budget, as a caller writes them."""
    amounts = usd_amounts if BY_NAME[name].unit == "usd" else count_amounts
    if BY_NAME[name].slots:
        amounts = st.sampled_from([1, 1, 2])
    return st.one_of(amounts, st.just(0)) if zero else amounts


def mapping_for(names, *, zero: bool = False):
    """A strategy for amounts of these budgets, in this order."""
    return st.fixed_dictionaries({name: amount_for(name, zero=zero) for name in names})


usual = st.sampled_from(["agent"] * 4 + ["team:quant", "hourly", "lifetime", "open-ended", "cycles", "tokens", "gpu"])
names_of_a_hold = st.one_of(
    usual.map(lambda name: [name]),
    st.lists(usual, min_size=2, max_size=4, unique=True),
)
requests = names_of_a_hold.flatmap(mapping_for)
spends = st.lists(usual.filter(lambda name: not BY_NAME[name].slots), min_size=1, max_size=4, unique=True).flatmap(
    lambda names: mapping_for(names, zero=True)
)
ttls = st.sampled_from([1, 1.5, 60, 900, 900, 3600, 43_200, 86_400])
policies = st.sampled_from(["charge", "charge", "accrued", "release"])
NEW_IDS = [f"op_{number}" for number in range(12)]
new_ids = st.sampled_from(NEW_IDS)
steps_s = st.sampled_from([0.4, 1, 10, 61, 600, 901, 3600, 5 * 3600, 86_400, 90_000, 3 * 86_400])

configured_limits = st.fixed_dictionaries(
    {b.name: st.none() if b.name == UNCAPPED else usd_limits if b.unit == "usd" else count_limits for b in BUDGETS}
)
scalars = amount_for("agent", zero=True)


class Choice(NamedTuple):
    """Arguments for a call about a hold. They are drawn before the budgets of the hold are known."""

    form: str
    chosen: set[str]
    each: dict[str, Any]
    usd: Any
    count: int
    operator: bool

    def amounts(self, names: Iterable[str], *, none: bool = True) -> Any:
        """``None``, a scalar if its budgets are unambiguous, or a mapping of some of the budgets."""
        if self.form == "nothing" and none:
            return None
        if self.form == "scalar":
            if any(BY_NAME[name].unit == "usd" for name in names):
                return self.usd
            if sum(not BY_NAME[name].slots for name in names) == 1:
                return self.count
        return {name: self.each[name] for name in names if name in self.chosen}

    def totals(self, names: Iterable[str]) -> dict[str, Any]:
        """New totals of at least one of the budgets."""
        names = list(names)
        grown = [name for name in names if name in self.chosen] or names[:1]
        return {name: self.each[name] or 1 for name in grown}


choices = st.builds(
    Choice,
    st.sampled_from(["mapping", "scalar", "nothing"]),
    st.sets(st.sampled_from(list(BY_NAME))),
    mapping_for(BY_NAME, zero=True),
    scalars,
    st.integers(0, 9),
    st.booleans(),
)

bad_amounts = st.sampled_from(
    [
        0,
        -1,
        "-0.01",
        "NaN",
        "Infinity",
        float("nan"),
        True,
        None,
        "",
        "1_0",
        "0x1",
        b"1",
        [],
        2**53,
        "9007199.254740992",
    ]
)
impossible_reservations = st.one_of(
    bad_amounts.map(lambda amount: ({"agent": amount}, {}, "InvalidAmount")),
    bad_amounts.map(lambda amount: ({"lifetime": "0.01", "agent": amount}, {}, "InvalidAmount")),
    st.sampled_from([1.5, "0.1", 2**53]).map(lambda amount: ({"tokens": amount}, {}, "InvalidAmount")),
    st.sampled_from(["", "a b", "ä", "x" * 129, "a,b", "a\n", None, 7]).map(
        lambda name: ({name: "0.01"}, {}, "InvalidArgument")
    ),
    st.just(({"unknown": "0.01"}, {}, "UnknownBudget")),
    st.just(({}, {}, "InvalidArgument")),
    st.sampled_from(["", "a b", "x" * 129, 7]).map(lambda bad: ({"agent": 1}, {"id": bad}, "InvalidArgument")),
    st.sampled_from([0, 0.5, 86_401, -1, True, "60", float("nan"), None]).map(
        lambda ttl: ({"agent": 1}, {"ttl": ttl}, "InvalidArgument")
    ),
    st.sampled_from(["", "keep", None, []]).map(
        lambda policy: ({"agent": 1}, {"on_expiry": policy}, "InvalidArgument")
    ),
)
