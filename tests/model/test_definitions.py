"""Random histories, compared with a small model: replicas define one budget differently, and migrate it."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from ktrdr_budget import Budget, BudgetExceeded, BudgetLimiter, DefinitionConflict
from ktrdr_budget.audit import verify

from ..helpers.keyspace import units_of_windows

DEFINITIONS = (
    {},
    {"timezone": "Europe/Berlin"},
    {"timezone": "Asia/Kathmandu"},
    {"unit": "tokens"},
)
"""Each definition is used with an endless window, so no window ends during a history."""
REPLICAS = (0, 0, 1, 2, 3)
"""The definition of each replica, by number; the first two replicas have the same definition."""
LIMIT = 10


@dataclass
class Model:
    """The registered definition, and the counted amount in the window of each definition."""

    registered: int | None = None
    counted: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(len(DEFINITIONS)), 0))
    holds: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The definition and the amount of each open hold, by id."""

    def admits(self, definition: int) -> bool:
        return self.registered in (None, definition)

    def reserve(self, definition: int, hold_id: str, amount: int) -> str:
        if not self.admits(definition):
            return "conflict"
        if self.counted[definition] + amount > LIMIT:
            return "denied"
        self.registered = definition
        self.counted[definition] += amount
        self.holds[hold_id] = definition, amount
        return "done"

    def record(self, definition: int, amount: int) -> str:
        if not self.admits(definition):
            return "conflict"
        self.registered = definition
        self.counted[definition] += amount
        return "done"

    def settle(self, hold_id: str, amount: int) -> str:
        """Settle in the window in which the hold was granted, even if another definition is registered now."""
        definition, before = self.holds.pop(hold_id)
        self.counted[definition] += amount - before
        return "done"

    def migrate(self, definition: int) -> str:
        self.registered = definition
        return "done"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "record", "settle", "settle", "migrate"]),
        st.integers(0, len(REPLICAS) - 1),
        st.integers(0, 4),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_replicas_with_different_budget_definitions_spend_as_the_reference_model_predicts(server, client, steps):
    client.flushall()
    budgets = [Budget("agent", LIMIT, period="ever", **DEFINITIONS[definition]) for definition in REPLICAS]
    limiters = [BudgetLimiter(server.url, [budget], timeout=10) for budget in budgets]
    model = Model()
    try:
        for number, (action, replica, amount) in enumerate(steps):
            definition, limiter = REPLICAS[replica], limiters[replica]
            note(f"{action} by replica {replica}, {amount}")
            if action == "settle":
                if model.holds:
                    hold_id = sorted(model.holds)[amount % len(model.holds)]
                    assert outcome(limiter.commit, hold_id, {"agent": amount}) == model.settle(hold_id, amount)
            elif action == "reserve":
                hold_id, requested = f"op_{number}", amount + 1
                assert outcome(limiter.reserve, "agent", requested, id=hold_id) == model.reserve(
                    definition, hold_id, requested
                )
            elif action == "record":
                assert outcome(limiter.record, "agent", amount) == model.record(definition, amount)
            else:
                assert outcome(limiter.migrate, "agent") == model.migrate(definition)
            assert outcome(limiter.status, "agent") == ("done" if model.admits(definition) else "conflict")
        assert sorted(units_of_windows(client, "agent")) == sorted(
            amount * (10**9 if DEFINITIONS[definition].get("unit") is None else 1)
            for definition, amount in model.counted.items()
            if amount
        )
        assert all(report.adds_up for report in verify(server.url))
    finally:
        for limiter in limiters:
            limiter.close()


def outcome(call, *given, **options) -> str:
    try:
        call(*given, **options)
    except DefinitionConflict:
        return "conflict"
    except BudgetExceeded:
        return "denied"
    return "done"
