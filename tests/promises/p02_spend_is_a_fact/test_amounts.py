"""Amounts are exact integers from the caller to the store and back (P2, P9)."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, InvalidAmount, StoreError
from ktrdr_budget.audit import verify
from ktrdr_budget.money import MAX_UNITS

from ...helpers.keyspace import dump, ledger_sum, sums, window_key
from ...helpers.waiting import until

MOST = Decimal("9007199.254740991")
"""The largest amount in dollars: 2**53 - 1 nano-dollars."""

BUDGETS = [
    Budget("agent", "5.00"),
    Budget("open", None),
    Budget("large", MOST),
    Budget("tokens", MAX_UNITS - 1, unit="tokens"),
    Budget("cycles", 10, unit="cycles"),
]


@pytest.fixture
async def limiter(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS, timeout=10.0) as made:
        yield made


async def test_8867_ten_thousand_commits_of_0_0000001_dollars_add_up_exactly(client, limiter):
    async def spend() -> None:
        hold = await limiter.reserve("agent", "0.0000002")
        await hold.commit("0.0000001")

    for _ in range(10):
        await asyncio.gather(*(spend() for _ in range(1000)))
    status = await limiter.status("agent")
    assert (status.spent, status.held, status.events) == (Decimal("0.001"), 0, 10_000)
    assert status.remaining == Decimal("4.999")
    assert ledger_sum(client) == 1_000_000


@pytest.mark.parametrize(
    ("amount", "spent"),
    [
        (0.0016150000000000001, "0.001615001"),  # a float is read through its repr, and rounds up
        ("0.0016150000000000001", "0.001615001"),
        (Decimal("0.0016150000000000001"), "0.001615001"),
        (0.001615, "0.001615"),
        (0.1 + 0.2, "0.300000001"),
        (0.3, "0.30"),
        ("1e-10", "0.000000001"),
        (1, "1.00"),
        ("1.23e-7", "0.000000123"),
        (1e-9, "0.000000001"),
    ],
)
async def test_8867_a_committed_amount_is_rounded_up_to_whole_nanodollars(limiter, amount, spent):
    hold = await limiter.reserve("agent", "2.00")
    settlement = await hold.commit(amount)
    status = await limiter.status("agent")
    assert settlement.amounts["agent"] == status.spent == Decimal(spent)
    assert status.remaining == 5 - Decimal(spent)
    assert f"{(await limiter.ledger('agent'))[0].amount:f}" == spent


async def test_27509_a_thousand_records_of_the_same_fractional_amount_add_up_exactly(limiter):
    await asyncio.gather(*(limiter.record("agent", 0.0016150000000000001) for _ in range(1000)))
    assert (await limiter.status("agent")).spent == Decimal("1.615001")


async def test_a_cap_of_one_nanodollar_admits_one_nanodollar_but_not_two(server):
    async with AsyncBudgetLimiter(server.url, [Budget("odd", "0.0000000015")]) as limiter:
        assert (await limiter.status("odd")).limit == Decimal("0.000000001"), "limits round down, amounts up"
        with pytest.raises(BudgetExceeded) as denied:
            await limiter.reserve("odd", "0.0000000011")
        assert str(denied.value) == "odd: exceeds_limit ($0.000000001 remaining, need $0.000000002)"
        hold = await limiter.reserve("odd", "0.0000000001")
        assert (await limiter.status("odd")).remaining == 0
        await hold.release()


async def test_the_largest_amount_is_exact_to_the_nanodollar(client, limiter):
    hold = await limiter.reserve({"large": MOST, "open": MOST})
    assert sums(client, "large")["held"] == MAX_UNITS - 1
    with pytest.raises(BudgetExceeded) as denied:
        await limiter.reserve("large", "0.000000001")
    assert (denied.value.remaining, denied.value.held, denied.value.limit) == (0, MOST, MOST)
    settlement = await hold.commit(MOST - Decimal("0.000000001"))
    assert settlement.amounts["large"] == Decimal("9007199.254740990")
    assert (await limiter.status("large")).remaining == Decimal("0.000000001")
    assert (await (await limiter.reserve("large", "0.000000001")).commit("0.000000001")).overrun is False
    assert (await limiter.status("large")).spent == MOST
    assert (await limiter.ledger("large"))[1].amount == MOST - Decimal("0.000000001")


async def test_an_amount_of_2_to_the_53_units_is_refused_and_nothing_is_written(client, limiter):
    too_much = MOST + Decimal("0.000000001")
    hold = await limiter.reserve("open", "1.00")
    before = dump(client)
    for call in (
        lambda: limiter.reserve("open", too_much),
        lambda: limiter.record("open", too_much),
        lambda: limiter.reserve("tokens", MAX_UNITS),
        lambda: limiter.set_limit("open", too_much),
        lambda: hold.commit(too_much),
        lambda: hold.grow(MOST + 1),
    ):
        with pytest.raises(InvalidAmount):
            await call()
    assert dump(client) == before


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_window_with_a_sum_of_2_to_the_53_or_more_denies_reservations_and_still_records_spend(
    client, limiter, at_once
):
    """Larger sums are exact too: the store adds them with HINCRBY, as integers and not as doubles."""
    records = [lambda: limiter.record("open", MOST) for _ in range(5)]
    if at_once:
        await asyncio.gather(*(record() for record in records))
    else:
        for record in records:
            await record()
    assert sums(client, "open")["spent"] == 5 * (MAX_UNITS - 1)
    with pytest.raises(BudgetExceeded) as denied:
        await limiter.reserve("open", "0.000000001")
    assert (denied.value.remaining, denied.value.fits) == (0, 0)
    with pytest.raises(BudgetExceeded):
        await limiter.reserve({"agent": "0.15", "open": "0.01"})
    await limiter.record("open", "0.000000001")
    status = await limiter.status("open")
    assert (status.spent, status.remaining) == (5 * MOST + Decimal("0.000000001"), None)
    assert sums(client, "agent")["held"] == 0


async def test_an_uncapped_budget_admits_at_most_2_to_the_53_minus_one_units(limiter):
    await limiter.record("open", MOST - Decimal("0.000000001"))
    with pytest.raises(BudgetExceeded) as denied:
        await limiter.reserve("open", "0.000000002")
    assert denied.value.fits == Decimal("0.000000001")
    hold = await limiter.reserve("open", denied.value.fits)
    with pytest.raises(BudgetExceeded):
        await limiter.reserve("open", "0.000000001")
    await hold.release()
    assert (await limiter.reserve("open", "0.000000001")).cap_checked


async def test_the_accrued_spend_of_several_holds_may_add_up_to_more_than_2_to_the_53(client, limiter):
    holds = [await limiter.reserve("open", "1.00") for _ in range(3)]
    for hold in holds:
        hold.accrue(MOST - 1)
    await asyncio.gather(*(hold.extend() for hold in holds))
    assert sums(client, "open")["held"] == 3 * int((MOST - 1) * 10**9)
    await asyncio.gather(*(hold.commit() for hold in holds))
    assert sums(client, "open") == {
        "spent": 3 * int((MOST - 1) * 10**9),
        "held": 0,
        "unconfirmed": 0,
        "events": 3,
    }


async def test_amounts_of_count_budgets_are_returned_as_integers_and_fractions_are_refused(limiter):
    hold = await limiter.reserve({"cycles": 2, "tokens": MAX_UNITS - 1})
    assert hold.amounts == {"cycles": 2, "tokens": MAX_UNITS - 1}
    settlement = await hold.commit({"cycles": 1, "tokens": MAX_UNITS - 3})
    assert settlement.amounts == {"cycles": 1, "tokens": MAX_UNITS - 3}
    assert all(type(amount) is int for amount in settlement.amounts.values())
    status = await limiter.status("tokens")
    assert (status.spent, status.remaining, type(status.spent)) == (MAX_UNITS - 3, 2, int)
    with pytest.raises(BudgetExceeded) as denied:
        await limiter.reserve("tokens", 3)
    assert (denied.value.fits, denied.value.requested) == (2, 3)
    for amount in ("1.5", 0.5, Decimal("0.1"), True):
        with pytest.raises(InvalidAmount):
            await limiter.reserve("cycles", amount)
    assert (await limiter.reserve("cycles", 9)).cap_checked
    with pytest.raises(BudgetExceeded):
        await limiter.reserve("cycles", 1)


# -- a window counts less than 2^62 units ------------------------------------------------------------------------------

LARGEST = 2**53 - 1
FULL = [Budget("tokens", None, unit="tokens"), Budget("agent", "50.00")]


async def test_a_record_is_refused_if_the_sum_of_its_window_would_reach_2_to_the_62(server):
    async with AsyncBudgetLimiter(server.url, FULL) as limiter:
        calls = [limiter.record("tokens", LARGEST, id=f"large/{number}") for number in range(1024)]
        innocent = await limiter.reserve("agent", "10.00")
        outcomes = await asyncio.gather(*calls, innocent.commit("10.00"), return_exceptions=True)
        recorded = [outcome for outcome in outcomes[:-1] if not isinstance(outcome, Exception)]
        refused = [outcome for outcome in outcomes[:-1] if isinstance(outcome, InvalidAmount)]
        assert (len(recorded), len(refused)) == (512, 512)
        assert "would count 4,611,686,018,427,387,904 tokens or more" in str(refused[0])
        assert (await limiter.status("agent")).spent == 10
        assert (await limiter.status("tokens")).spent == 512 * LARGEST
        await limiter.record("agent", "1.00")
        assert (await limiter.status("agent")).spent == 11
        for number, outcome in enumerate(outcomes[:-1]):
            if not isinstance(outcome, InvalidAmount):
                continue  # batches may overtake each other
            with pytest.raises(InvalidAmount):  # the refused record has left nothing behind
                await limiter.record("tokens", LARGEST, id=f"large/{number}")
    assert all(report.adds_up for report in await asyncio.to_thread(verify, server.url))


async def test_extensions_and_commits_are_refused_if_the_sum_of_their_window_would_reach_2_to_the_62(server):
    async with AsyncBudgetLimiter(server.url, FULL) as limiter:
        holds = [await limiter.reserve("tokens", 1, ttl=60) for _ in range(3)]
        for _ in range(511):
            await limiter.record("tokens", LARGEST)
        holds[0].accrue({"tokens": LARGEST})
        await holds[0].extend()
        holds[1].accrue({"tokens": LARGEST})
        with pytest.raises(InvalidAmount):
            await holds[1].extend()
        with pytest.raises(InvalidAmount):
            await holds[2].commit({"tokens": LARGEST})
        await holds[0].commit()
        await holds[1].commit({"tokens": 5})
        await holds[2].release()
        assert (await limiter.status("tokens")).spent == 512 * LARGEST + 5
    assert all(report.adds_up for report in await asyncio.to_thread(verify, server.url))


async def test_spend_reported_after_the_deadline_is_refused_if_the_sum_would_reach_2_to_the_62(clocked_server, caplog):
    clocked_server.set(clocked_server.now().replace(hour=12))
    async with AsyncBudgetLimiter(clocked_server.url, FULL) as limiter:
        late = asyncio.Event()

        async def fail() -> None:
            async with limiter.hold("tokens", 1, ttl=3600, on_error="charge") as hold:
                hold.accrue({"tokens": LARGEST})
                await late.wait()
                raise RuntimeError

        blocks = [asyncio.create_task(fail()) for _ in range(2)]

        async def granted() -> bool:
            return (await limiter.status("tokens")).held == 2

        await until(granted)
        await asyncio.gather(*(limiter.record("tokens", LARGEST) for _ in range(511)))
        clocked_server.advance(7200)
        late.set()
        assert {type(error) for error in await asyncio.gather(*blocks, return_exceptions=True)} == {RuntimeError}
        assert (await limiter.status("tokens")).unconfirmed == LARGEST + 1
        assert "failed: 'tokens' would count 4,611,686,018,427,387,904 tokens or more" in caplog.text
    assert all(report.adds_up for report in await asyncio.to_thread(verify, clocked_server.url))


async def test_only_operations_that_use_a_key_of_a_wrong_type_fail(server, client):
    """Every other operation is executed completely, whether the key is first read or first written."""
    async with AsyncBudgetLimiter(server.url, FULL) as limiter:
        await limiter.record({"tokens": 1, "agent": "0.01"})
        for key in (window_key(client, "tokens"), window_key(client, "tokens").replace(":w:", ":l:")):
            stored = client.dump(key)
            client.set(key, "of another type")
            for _ in range(2):  # the second time by the fast path, where that applies
                spent = (await limiter.status("agent")).spent
                hold = await limiter.reserve("agent", "0.50")
                good, bad, denied = await asyncio.gather(
                    hold.commit("0.25"),
                    limiter.record("tokens", 1),
                    limiter.reserve({"agent": "0.10", "tokens": 1}),
                    return_exceptions=True,
                )
                assert good.amounts == {"agent": Decimal("0.25")}
                assert isinstance(bad, StoreError) and isinstance(denied, StoreError)
                status = await limiter.status("agent")
                assert (status.spent, status.held) == (spent + Decimal("0.25"), 0)
            client.restore(key, 0, stored, replace=True)
        client.hset(limiter.keys.hold("taken"), "a", "b")
        good, bad = await asyncio.gather(
            limiter.record("agent", "0.50"), limiter.record("agent", "0.50", id="taken"), return_exceptions=True
        )
        assert good.state == "recorded" and isinstance(bad, StoreError)
        client.delete(limiter.keys.hold("taken"))
    assert all(report.adds_up for report in await asyncio.to_thread(verify, server.url))
