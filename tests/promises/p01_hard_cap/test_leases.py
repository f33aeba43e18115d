"""`limiter.lease(...)` grants from a prepaid chunk without a request; one cap applies to all replicas (P1)."""

from __future__ import annotations

import ast
import asyncio
import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    BudgetExceeded,
    HoldConflict,
    InvalidArgument,
    StoreUnavailable,
    UnknownBudget,
)
from ktrdr_budget.money import to_units

from ...helpers.keyspace import counted, immortal_keys, ledger_sum, sums
from ...helpers.waiting import until

AGENT = Budget("agent", "5.00")
BUDGETS = [AGENT]
TIMEOUT_S = 0.2


def only_spent(nanos: int, events: int) -> dict[str, int]:
    return {"spent": nanos, "held": 0, "unconfirmed": 0, "events": events}


# -- life of a lease ---------------------------------------------------------------------------------------------------


async def test_a_lease_holds_a_chunk_and_commits_its_spend(limiter, client):
    async with limiter.lease("agent", "0.50") as lease:
        [chunk] = await limiter.holds("agent")
        assert (chunk.amounts, chunk.operation, chunk.on_expiry) == ({"agent": Decimal("0.50")}, "lease", "charge")
        lease.spend("0.004")
        lease.spend(Decimal("0.006"))
        grant = lease.reserve(0.02)
        assert (lease.spent, lease.held, lease.remaining) == (Decimal("0.01"), Decimal("0.02"), Decimal("0.47"))
        grant.commit("0.013")
        with lease.reserve("0.05") as other:
            other.release()
        assert sums(client) == {"spent": 0, "held": to_units("0.50"), "unconfirmed": 0, "events": 0}, (
            "no request was sent"
        )
    assert sums(client) == only_spent(to_units("0.023"), 1)
    [entry] = await limiter.ledger("agent")
    assert (entry.kind, entry.amount, entry.operation) == ("commit", Decimal("0.023"), "lease")
    assert immortal_keys(client) == []


async def test_closing_an_unused_lease_writes_no_ledger_entry(limiter, client):
    async with limiter.lease("agent", "0.50"):
        pass
    assert sums(client) == only_spent(0, 0)


async def test_a_lease_reserves_its_next_chunk_before_the_current_chunk_is_used_up(limiter, client):
    async with limiter.lease("agent", "0.10") as lease:
        for _ in range(40):
            lease.spend("0.01")
            await until(lambda: lease.remaining >= Decimal("0.05"))
        assert lease.spent == Decimal("0.40")
        await until(lambda: sums(client)["spent"] >= to_units("0.30"))
        assert counted(client) <= to_units("0.40") + 2 * to_units("0.10")
    assert sums(client) == only_spent(to_units("0.40"), 4)


async def test_acquire_waits_for_the_next_chunk_of_a_lease_but_reserve_raises_at_once(limiter, client):
    async with limiter.lease("agent", "0.10") as lease:
        lease.spend("0.10")
        with pytest.raises(BudgetExceeded) as denied:
            lease.reserve("0.02")
        assert (denied.value.reason, denied.value.fits) == ("lease_refilling", 0)
        grants = await asyncio.gather(*(lease.acquire("0.03") for _ in range(20)))
        assert lease.held == Decimal("0.60")
        for grant in grants:
            grant.commit("0.02")
        larger = await lease.acquire("1.00")
        larger.commit()
    assert sums(client)["spent"] == to_units("1.50")
    assert sums(client)["held"] == 0


async def test_a_lease_can_spend_the_rest_of_a_budget_if_a_whole_chunk_no_longer_fits(limiter, client):
    """The lease then reserves a smaller chunk, which is large enough for the amount of the call."""
    async with limiter.lease("agent", "0.30") as lease:
        with pytest.raises(BudgetExceeded) as denied:
            while True:
                (await lease.acquire("0.007")).commit("0.007")
        assert Decimal("5.00") - Decimal("0.007") < lease.spent <= Decimal("5.00")
        assert denied.value.reason == "budget_exhausted"
        assert denied.value.spent == lease.spent
        assert denied.value.fits == Decimal("5.00") - lease.spent
        with pytest.raises(BudgetExceeded) as again:
            lease.spend("0.01")
        assert again.value.reason == "budget_exhausted"
        (await lease.acquire(denied.value.fits)).commit()
        assert lease.spent == Decimal("5.00")
        with pytest.raises(BudgetExceeded) as impossible:
            await lease.acquire("5.01")
        assert impossible.value.reason == "exceeds_limit"
    assert sums(client)["spent"] == to_units("5.00")
    assert sums(client)["held"] == 0


async def test_a_lease_of_a_budget_without_room_opens_empty_and_gets_a_chunk_later(limiter):
    hold = await limiter.reserve("agent", "5.00")
    async with limiter.lease("agent", "0.50") as lease:
        assert lease.remaining == 0
        with pytest.raises(BudgetExceeded) as denied:
            await lease.acquire("0.02")
        assert (denied.value.reason, denied.value.held) == ("budget_held", Decimal("5.00"))
        await hold.commit("1.00")
        (await lease.acquire("0.02")).commit()
        assert lease.remaining == Decimal("0.48")


async def test_after_an_idle_chunk_is_released_the_lease_reserves_a_new_chunk_for_the_next_grant(limiter, client):
    async with limiter.lease("agent", "0.50", idle=0.1) as lease:
        lease.spend("0.02")
        await until(lambda: sums(client) == only_spent(to_units("0.02"), 1))
        grant = await lease.acquire("0.01")
        await asyncio.sleep(0.3)  # three times ``idle``
        assert sums(client)["held"] == to_units("0.50"), "a lease with an open grant is not idle"
        grant.commit()
        await until(lambda: sums(client)["held"] == 0)
        assert lease.spent == Decimal("0.03")
    assert sums(client) == only_spent(to_units("0.03"), 2)


async def test_a_chunk_stays_reserved_after_its_lease_closes_until_the_last_grant_is_settled(limiter, client):
    async with limiter.lease("agent", "0.50") as lease:
        lease.spend("0.10")
        grant = lease.reserve("0.20")
    assert sums(client)["held"] == to_units("0.50")
    with pytest.raises(RuntimeError, match="closed"):
        lease.spend("0.01")
    grant.commit("0.15")
    await until(lambda: sums(client) == only_spent(to_units("0.25"), 1))
    await until(lambda: not limiter.engine.lease_calls.open_leases)


async def test_closing_the_limiter_commits_the_spend_of_a_lease_and_charges_open_grants_in_full(server, client):
    limiter = AsyncBudgetLimiter(server.url, [AGENT])
    lease = await limiter.lease("agent", "0.50").__aenter__()
    lease.spend("0.10")
    grant = lease.reserve("0.20")
    await limiter.close()
    assert sums(client) == only_spent(to_units("0.30"), 1)
    with pytest.raises(HoldConflict, match="charged in full"):
        grant.commit("0.15")
    grant.commit()
    with pytest.raises(RuntimeError, match="closed"):
        await lease.acquire("0.01")


async def test_a_commit_above_the_amount_of_its_grant_is_recorded_in_full_as_an_overrun(limiter, client):
    async with limiter.lease("agent", "0.10") as lease:
        lease.reserve("0.05").commit("0.25")
        await until(lambda: sums(client)["spent"] == to_units("0.25"))  # at once: no chunk covers it
        (await lease.acquire("0.01")).release()
    assert sums(client) == only_spent(to_units("0.25"), 1)
    assert (await limiter.status("agent")).overruns == 1


async def test_a_cancelled_acquire_gets_no_grant_and_a_cancelled_lease_block_commits_its_spend(limiter, client):
    """P14: a cancellation leaves no hold and loses no spend."""
    await limiter.reserve("agent", "4.00")
    async with limiter.lease("agent", "1.00") as lease:
        kept = lease.reserve("1.00")
        waiting = [asyncio.create_task(lease.acquire("0.50")) for _ in range(5)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        kept.commit("0.20")
        assert (lease.held, lease.spent) == (0, Decimal("0.20"))

    spent = asyncio.Event()

    async def work() -> None:
        async with limiter.lease("agent", "0.50") as lease:
            lease.spend("0.10")
            spent.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await until(spent.is_set)
    assert sums(client)["held"] == to_units("4.50")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: sums(client)["spent"] == to_units("0.30"))
    assert sums(client)["held"] == to_units("4.00")


async def test_invalid_lease_arguments_are_refused(server):
    budgets = [AGENT, Budget("slots", 3, kind="slots"), Budget("tokens", 1000, unit="tokens")]
    async with AsyncBudgetLimiter(server.url, budgets) as limiter:
        for wrong in (
            lambda: limiter.lease("slots", 1),
            lambda: limiter.lease("agent", 0),
            lambda: limiter.lease("agent", "0.10", low_water="0.20"),
            lambda: limiter.lease("agent", "0.10", ttl=0.5),
            lambda: limiter.lease("agent", "0.10", idle=0),
        ):
            with pytest.raises(InvalidArgument):
                wrong()
        with pytest.raises(UnknownBudget):
            limiter.lease("other", 1)
        async with limiter.lease("tokens", 100) as lease:
            lease.spend(7)
            assert (lease.spent, lease.remaining) == (7, 93)


async def test_the_examples_in_the_lease_document_run_without_an_error(server, client):
    text = (Path(__file__).parents[3] / "docs" / "leases.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {"url": server.url, "print": lambda *words: None}
    await eval(compile(code[0], "docs/leases.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    assert sums(client) == only_spent(to_units("0.030"), 1)
    exec(code[1], names)
    await names["limiter"].close()
    assert len(code) == 2


# -- windows and deadlines ---------------------------------------------------------------------------------------------


async def test_spend_from_a_chunk_counts_in_the_window_in_which_the_chunk_was_reserved(clocked_server):
    clocked_server.set(datetime(2026, 11, 23, 23, 59, 58, tzinfo=UTC))
    with clocked_server.client() as client:
        async with AsyncBudgetLimiter(clocked_server.url, [AGENT]) as limiter:
            async with limiter.lease("agent", "0.50") as lease:
                lease.spend("0.10")
                over_midnight = lease.reserve("0.15")
                clocked_server.set(datetime(2026, 11, 24, 0, 0, 1, tzinfo=UTC))
                await limiter.status("agent")
                with pytest.raises(BudgetExceeded):
                    lease.spend("0.01")
                (await lease.acquire("0.03")).commit()
                over_midnight.commit("0.11")
                await until(lambda: sums(client, window="2026-11-23") == only_spent(to_units("0.21"), 1))
            assert sums(client, window="2026-11-24") == only_spent(to_units("0.03"), 1)


async def test_a_lease_replaces_a_chunk_that_has_been_reserved_for_almost_a_day(clocked_server):
    clocked_server.reset_clock()
    with clocked_server.client() as client:
        async with AsyncBudgetLimiter(clocked_server.url, [Budget("all", "5.00", period="ever")]) as limiter:
            async with limiter.lease("all", "0.50", idle=None) as lease:
                lease.spend("0.10")
                clocked_server.advance(21 * 3600)
                await limiter.status("all")
                (await lease.acquire("0.03")).commit()
                await until(lambda: sums(client, "all", "ever")["spent"] == to_units("0.10"))
            assert sums(client, "all", "ever")["spent"] == to_units("0.13")
            assert sums(client, "all", "ever")["unconfirmed"] == sums(client, "all", "ever")["held"] == 0


async def test_heartbeats_extend_a_chunk_and_report_how_much_of_the_chunk_is_spent(limiter, client):
    async with limiter.lease("agent", "0.50", ttl=1) as lease:
        lease.spend("0.10")
        [chunk] = await limiter.holds("agent")
        await until(lambda: _was_extended(limiter, chunk))


async def _was_extended(limiter, before) -> bool:
    [chunk] = await limiter.holds("agent")
    return chunk.accrued == {"agent": Decimal("0.10")} and chunk.expires_at > before.expires_at


@pytest.mark.parametrize("by_hand", [True, False])
async def test_after_a_chunk_is_released_by_id_the_lease_grants_only_from_a_new_chunk(limiter, client, by_hand):
    async with limiter.lease("agent", "0.50", ttl=1) as lease:
        lease.spend("0.10")
        [chunk] = await limiter.holds("agent")
        await limiter.release(chunk.id, operator=by_hand)
        await limiter.reserve("agent", "5.00")
        await until(lambda: lease.chunk.hold is None)
        await limiter.set_limit("agent", "10.00")
        (await lease.acquire("0.02")).commit()
    await until(lambda: sums(client)["spent"] == to_units("0.12"))
    assert sums(client)["held"] == to_units("5.00")
    assert ledger_sum(client) == to_units("0.12"), "spend is a fact"


# -- stores that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["deny", "allow", "lease"])
async def test_during_an_outage_a_lease_grants_only_what_is_left_of_its_chunk(own_server, policy):
    """Policy `lease` also keeps a prepaid chunk for outages; the lease of the test spends nothing from that chunk."""
    options = {"on_store_error": policy, "lease_slab": "1.00" if policy == "lease" else None}
    async with AsyncBudgetLimiter(own_server.url, [AGENT], timeout=TIMEOUT_S, **options) as limiter:
        async with limiter.lease("agent", "0.50") as lease:
            own_server.kill()
            for _ in range(50):
                lease.spend("0.01")
            with pytest.raises((StoreUnavailable, BudgetExceeded)):
                lease.spend("0.01")
            with pytest.raises(StoreUnavailable):
                await lease.acquire("0.01")
            await until(lambda: isinstance(lease.last_refill_error, StoreUnavailable))
            with pytest.raises(StoreUnavailable, match=r"has \$0.00 left"):
                lease.spend("0.01")
            assert lease.spent == Decimal("0.50")
        assert limiter.deferred == 1
        own_server.start()
        with own_server.client() as client:
            await until(lambda: sums(client)["spent"] == to_units("0.50"))
            assert sums(client)["held"] == (to_units("1.00") if policy == "lease" else 0)


async def test_a_lease_opened_during_an_outage_gets_a_chunk_after_the_outage(own_server):
    own_server.kill()
    async with AsyncBudgetLimiter(own_server.url, [AGENT], timeout=TIMEOUT_S) as limiter:
        async with limiter.lease("agent", "0.50") as lease:
            assert lease.remaining == 0
            own_server.start()
            grant = await until(lambda: _acquired(lease))
            grant.commit("0.01")
        with own_server.client() as client:
            assert sums(client) == only_spent(to_units("0.01"), 1)


async def _acquired(lease):
    try:
        return await lease.acquire("0.02")
    except StoreUnavailable:
        return None


async def test_if_the_deadline_of_a_chunk_passes_during_an_outage_the_commit_still_records_the_exact_spend(own_server):
    """P5: no heartbeat arrives, so the whole chunk becomes unconfirmed and still counts against the cap."""
    async with AsyncBudgetLimiter(own_server.url, [AGENT], timeout=TIMEOUT_S) as limiter:
        async with limiter.lease("agent", "0.50", ttl=1) as lease:
            lease.spend("0.10")
            with own_server.client() as client:
                deadline_s = client.zrange("ktrdr:{default}:due", 0, -1, withscores=True)[0][1] / 1000
            own_server.pause()
            await until(lambda: datetime.now(UTC).timestamp() > deadline_s + 0.5)
            lease.spend("0.05")
            own_server.resume()
        with own_server.client() as client:
            await until(lambda: sums(client)["spent"] == to_units("0.15"))
            assert sums(client)["held"] == sums(client)["unconfirmed"] == 0
            assert ledger_sum(client) == to_units("0.15")


@pytest.mark.slow
async def test_after_a_data_loss_the_chunk_and_the_spend_of_a_lease_are_restored(server, client):
    """P13: the lease continues, and its final spend is exact."""
    async with AsyncBudgetLimiter(server.url, [AGENT], timeout=10.0) as limiter:
        async with limiter.lease("agent", "0.10") as lease:
            for _ in range(7):
                (await lease.acquire("0.03")).commit()
            await until(lambda: sums(client)["spent"] > 0)
            client.flushall()
            for _ in range(7):
                (await lease.acquire("0.03")).commit()
        assert limiter.losses == 1
        assert sums(client)["spent"] == ledger_sum(client) == to_units("0.42")
        assert sums(client)["held"] == 0
