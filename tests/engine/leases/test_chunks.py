"""The arithmetic of leases, without a store: random histories against a plain model."""

from __future__ import annotations

import threading
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget.engine.leases.chunks import Chunk, Chunks, Grant
from ktrdr_budget.errors import BudgetExceeded, HoldConflict, InvalidAmount, StoreUnavailable


def chunks_at(now_ms: list[int], *sizes: int, ends_ms: float = 1000, low: int = 0) -> Chunks:
    made = Chunks("agent", "usd", 100, low, lambda: now_ms[0])
    for size in sizes:
        made.add(Chunk(object(), size, ends_ms))  # any hold will do
    return made


def nanos(units: int) -> Decimal:
    return Decimal(units) / 10**9


class ChunkModel:
    """A chunk in the model: reserved, spent and granted units."""

    def __init__(self, reserved: int, ends_ms: int) -> None:
        self.reserved, self.ends_ms, self.spent, self.open = reserved, ends_ms, 0, 0

    def room(self, now_ms: int) -> int:
        return self.reserved - self.spent - self.open if now_ms < self.ends_ms else -1


actions = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 50), st.integers(1, 40)),
    st.tuples(st.just("spend"), st.integers(0, 30)),
    st.tuples(st.just("reserve"), st.integers(1, 30)),
    st.tuples(st.just("settle"), st.integers(0, 20), st.integers(0, 40)),
    st.tuples(st.just("wait"), st.integers(1, 10)),
)


@given(st.lists(actions, max_size=60))
def test_chunks_agree_with_a_model_of_plain_arithmetic_in_random_histories(history):
    now_ms = [0]
    chunks = chunks_at(now_ms)
    granting: list[ChunkModel] = []
    models: list[tuple[Chunk, ChunkModel]] = []
    grants: list[tuple[Grant, ChunkModel, int]] = []

    def find(units: int) -> ChunkModel | None:
        while granting and now_ms[0] >= granting[0].ends_ms:
            granting.pop(0)
        granting[:] = [model for model in granting if now_ms[0] < model.ends_ms]
        if len(granting) == 2 and granting[0].room(now_ms[0]) < units <= granting[1].room(now_ms[0]):
            granting.pop(0)
        return granting[0] if granting and granting[0].room(now_ms[0]) >= units else None

    for action, *figures in history:
        if action == "add":
            made = Chunk(object(), figures[0], now_ms[0] + figures[1])
            model = ChunkModel(figures[0], now_ms[0] + figures[1])
            with chunks.lock:
                chunks.leave_ended(now_ms[0])
            chunks.add(made)
            granting[:] = [*[other for other in granting if now_ms[0] < other.ends_ms][-1:], model]
            models.append((made, model))
        elif action == "wait":
            now_ms[0] += figures[0]
        elif action == "spend":
            model_or_none = find(figures[0]) if figures[0] else None
            try:
                chunks.spend(nanos(figures[0]))
            except BudgetExceeded:
                assert model_or_none is None
            else:
                assert model_or_none is not None or not figures[0]
                if model_or_none is not None:
                    model_or_none.spent += figures[0]
        elif action == "reserve":
            model_or_none = find(figures[0])
            try:
                grant = chunks.reserve(nanos(figures[0]))
            except BudgetExceeded:
                assert model_or_none is None
            else:
                assert model_or_none is not None
                model_or_none.open += figures[0]
                grants.append((grant, model_or_none, figures[0]))
        elif action == "settle" and grants:
            grant, model, reserved = grants.pop(figures[0] % len(grants))
            grant.commit(nanos(figures[1]))
            model.open -= reserved
            model.spent += figures[1]
        for chunk, model in models:
            assert (chunk.reserved, chunk.spent, chunk.granted) == (model.reserved, model.spent, model.open)
        assert chunks.spent == nanos(sum(model.spent for _, model in models))
        assert chunks.held == nanos(sum(model.open for _, model in models))
        assert sum(chunk.spent + chunk.granted for chunk, _ in models) <= sum(
            max(model.reserved, model.spent + model.open) for _, model in models
        )


def test_a_refused_amount_is_not_spent_and_the_error_has_the_figures_of_the_lease():
    chunks = chunks_at([0], 100)
    chunks.spend(nanos(60))
    with pytest.raises(BudgetExceeded) as denied:
        chunks.spend(nanos(41))
    figures = denied.value.denial
    assert (figures.reason, figures.requested, figures.fits) == ("lease_refilling", nanos(41), nanos(40))
    assert (figures.limit, figures.spent, figures.remaining) == (nanos(100), nanos(60), nanos(40))
    assert str(denied.value) == "agent: lease_refilling ($0.00000004 remaining, need $0.000000041)"
    chunks.spend(nanos(40))
    assert (chunks.spent, chunks.remaining) == (nanos(100), 0)


def test_a_lease_with_too_little_left_raises_store_unavailable_if_its_last_refill_failed():
    chunks = chunks_at([0], 100)
    chunks.last_refill_error = StoreUnavailable("store at x sent no reply")
    with pytest.raises(StoreUnavailable, match=r"the lease of 'agent' has \$0.0000001 left: store at x"):
        chunks.reserve("0.01")


def test_a_chunk_grants_nothing_after_the_end_of_its_window():
    now_ms = [999]
    chunks = chunks_at(now_ms, 100)
    grant = chunks.reserve(nanos(10))
    now_ms[0] = 1000
    with pytest.raises(BudgetExceeded):
        chunks.spend(nanos(1))
    grant.commit(nanos(4))
    assert chunks.spent == nanos(4)
    assert chunks.remaining == 0


def test_a_lease_uses_its_next_chunk_if_the_first_chunk_has_too_little_left():
    chunks = chunks_at([0], 10, 100)
    chunks.spend(nanos(8))
    chunks.spend(nanos(3))
    assert [chunk.spent for chunk in chunks.retired] == [8]
    assert chunks.remaining == nanos(97)


def test_a_settled_grant_refuses_a_different_settlement():
    chunks = chunks_at([0], 100)
    grant = chunks.reserve(nanos(10))
    assert (grant.amount, grant.settled) == (nanos(10), False)
    grant.commit(nanos(4))
    grant.commit(nanos(4))
    for again in (grant.release, grant.commit, lambda: grant.commit(nanos(5))):
        with pytest.raises(HoldConflict):
            again()
    assert (chunks.spent, chunks.held, grant.settled) == (nanos(4), 0, True)
    assert repr(grant) == "<Grant agent $0.00000001 committed $0.000000004>"


def test_a_grant_used_as_a_context_manager_is_settled_at_the_end_of_the_block():
    chunks = chunks_at([0], 100)
    with chunks.reserve(nanos(10)):
        pass
    with chunks.reserve(nanos(10)) as grant:
        grant.commit(nanos(3))
    with pytest.raises(KeyError), chunks.reserve(nanos(10)):
        raise KeyError
    assert (chunks.spent, chunks.held) == (nanos(13), 0)


def test_a_commit_above_its_grant_takes_the_difference_from_the_chunk():
    chunks = chunks_at([0], 100)
    chunks.reserve(nanos(90)).commit(nanos(95))
    assert chunks.remaining == nanos(5)
    chunks.reserve(nanos(5)).commit(nanos(50))
    assert (chunks.spent, chunks.remaining) == (nanos(145), 0)
    with pytest.raises(BudgetExceeded):
        chunks.spend(nanos(1))


@pytest.mark.parametrize("amount", [True, -1, "x", None, float("nan"), "1e9999999"])
def test_invalid_amounts_are_refused(amount):
    chunks = chunks_at([0], 100)
    for decide in (chunks.spend, chunks.reserve):
        with pytest.raises(InvalidAmount):
            decide(amount)
    with pytest.raises(InvalidAmount):
        chunks.reserve(0)
    chunks.spend(0)
    assert chunks.spent == 0


def test_a_float_amount_is_converted_through_its_repr_and_a_decimal_amount_is_used_exactly():
    """The float 0.1 is a little more than 0.1: its exact value as a Decimal is rounded up, but its repr is 0.1."""
    chunks = chunks_at([0], 10**9)
    exactly = Decimal.from_float(0.1)
    chunks.spend(exactly)
    assert chunks.spent == Decimal("0.100000001")
    chunks.spend(0.1)
    chunks.spend("0.1")
    assert chunks.spent == Decimal("0.300000001")
    chunks.spend(Decimal(0))
    with pytest.raises(InvalidAmount):
        chunks.spend(False)


def test_threads_spend_a_shared_chunk_exactly():
    chunks = chunks_at([0], 10_000, ends_ms=float("inf"))
    granted: list[int] = []

    def work() -> None:
        count = 0
        for _ in range(3_000):
            try:
                chunks.spend(nanos(1))
                grant = chunks.reserve(nanos(3))
            except BudgetExceeded:
                break
            grant.commit(nanos(2))
            count += 1
        granted.append(count)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chunks.held == 0
    assert 3 * sum(granted) <= round(chunks.spent * 10**9) <= 10_000
    assert 10_000 - round(chunks.spent * 10**9) < 3 + 8 * 3


def test_a_request_larger_than_every_chunk_leaves_the_chunks_unchanged():
    chunks = chunks_at([0], 100, 100)
    with pytest.raises(BudgetExceeded):
        chunks.reserve(nanos(101))
    assert chunks.remaining == nanos(200)
