"""The reference model itself: figures of the contract, and random calls after which the sums of the model add up."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .reference import BudgetModel, Reference, Refused, units_of, window_bounds, window_name

NOON_MS = int(datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp() * 1000)
CENT = 10**7
AGENT, CYCLES, SLOTS = BudgetModel("agent"), BudgetModel("cycles", unit="cycles"), BudgetModel("gpu", "gpu", slots=True)


def model_of(limit: int | None = 500 * CENT) -> Reference:
    model = Reference([AGENT, CYCLES, SLOTS], NOON_MS)
    model.configured.append({"agent": limit, "cycles": 10, "gpu": 2})
    return model


def reserve(model: Reference, cents: int, hold_id: str, on_expiry: str = "charge", ttl_ms: int = 900_000):
    return model.reserve(0, {"agent": cents * CENT}, hold_id, ttl_ms, on_expiry)


def figures(model: Reference) -> tuple[int, int, int]:
    """Spent, held and unconfirmed of today's window, in cents."""
    status = model.status(0, "agent")
    return status["spent"] // CENT, status["held"] // CENT, status["unconfirmed"] // CENT


def reason(model: Reference, cents: int) -> tuple:
    with pytest.raises(Refused) as denied:
        reserve(model, cents, "denied")
    found = denied.value.figures
    return found["reason"], found["remaining"] // CENT, found["retry_after_ms"]


def test_the_model_denies_with_the_documented_reasons():
    model = model_of()
    model.record({"agent": 300 * CENT}, "spent")
    reserve(model, 150, "held")
    assert reason(model, 501) == ("exceeds_limit", 50, None)
    assert reason(model, 100) == ("budget_held", 50, 900_000)
    assert reason(model, 250) == ("budget_exhausted", 50, 12 * 3_600_000)


def test_the_model_charges_an_expired_hold_according_to_the_expiry_policy():
    for policy, cents in {"charge": 100, "accrued": 30, "release": 0}.items():
        model = model_of()
        reserve(model, 100, "op_1", policy)
        model.extend("op_1", 60_000, {"agent": 30 * CENT})
        assert figures(model) == (0, 100, 0)
        model.advance(60_000)
        assert figures(model) == (0, 0, cents)
        late = model.commit("op_1", 70 * CENT)
        assert (late.late, figures(model)) == (True, (70, 0, 0))
        assert model.commit("op_1", 70 * CENT).replayed
        with pytest.raises(Refused):
            model.commit("op_1", 71 * CENT)


def test_the_model_charges_a_hold_to_the_window_of_the_reservation():
    model = model_of()
    reserve(model, 100, "op_1", ttl_ms=86_400_000)
    model.advance(13 * 3_600_000)
    assert figures(model) == (0, 0, 0)
    model.commit("op_1", 600 * CENT)
    assert figures(model) == (0, 0, 0)
    assert model.windows["agent", "2026-11-23"].spent == 600 * CENT


def test_the_model_rounds_amounts_up_and_limits_down():
    assert units_of("0.0000000001", "usd") == 1
    assert units_of("0.0000000019", "usd", down=True) == 1
    assert units_of(0.1, "usd") == 10**8
    assert units_of("7", "tokens") == 7


@pytest.mark.parametrize(
    ("timezone", "local_day", "hours"),
    [
        ("UTC", "2026-11-01", 24),
        ("America/New_York", "2026-11-01", 25),
        ("America/New_York", "2026-03-08", 23),
        ("Africa/Cairo", "2026-04-24", 23),  # begins at 01:00: its midnight is skipped
        ("Africa/Cairo", "2026-10-29", 25),  # its last hour is repeated
    ],
)
def test_a_day_window_of_the_model_lasts_as_long_as_the_local_day(timezone, local_day, hours):
    noon_ms = int(datetime.fromisoformat(f"{local_day}T12:00:00+00:00").timestamp() * 1000)
    begins, ends = window_bounds("day", timezone, noon_ms)
    assert window_name("day", timezone, noon_ms) == local_day
    assert ends - begins == hours * 3_600_000


calls = st.one_of(
    st.tuples(
        st.just("reserve"), st.integers(0, 5), st.integers(1, 300), st.sampled_from(("charge", "accrued", "release"))
    ),
    st.tuples(st.just("commit"), st.integers(0, 5), st.integers(0, 400)),
    st.tuples(st.just("release"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("record"), st.integers(6, 8), st.integers(0, 200)),
    st.tuples(st.just("extend"), st.integers(0, 5), st.integers(0, 400), st.integers(0, 400)),
    st.tuples(st.just("wait"), st.sampled_from((1, 600, 901, 40_000, 90_000))),
)


@given(st.lists(calls, max_size=40))
def test_in_random_histories_of_the_model_the_windows_add_up_and_no_grant_exceeds_the_cap(history):
    model = model_of()
    for call, *words in history:
        try:
            granted = perform(model, call, words)
        except Refused:
            granted = False
        for window in model.windows.values():
            parts = [(hold, p) for hold in model.holds.values() for p in hold.parts.values() if p.window is window]
            assert window.held == sum(part.weight for hold, part in parts if hold.state == "open")
            assert window.spent + window.unconfirmed == sum(amount for _, _, amount, _ in window.ledger)
            assert min(window.spent, window.held, window.unconfirmed) >= 0
            assert not granted or window.name != model.window("agent").name or window.total <= 500 * CENT


def perform(model: Reference, call: str, words: list) -> bool:
    """Make a call; return whether it was a new grant."""
    match call, words:
        case "reserve", (number, cents, policy):
            return not reserve(model, cents, f"op_{number}", policy).replayed
        case "commit", (number, cents):
            model.commit(f"op_{number}", cents * CENT)
        case "release", (number, operator):
            model.release(f"op_{number}", operator=operator)
        case "record", (number, cents):
            model.record({"agent": cents * CENT}, f"op_{number}")
        case "extend", (number, accrued, total):
            model.extend(f"op_{number}", 60_000, {"agent": accrued * CENT}, {"agent": total * CENT})
        case "wait", (seconds,):
            model.advance(seconds * 1000)
    return False
