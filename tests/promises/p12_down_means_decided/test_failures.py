"""Failures of budgets in production, and the tests for them. Numbers without a project are issues of BerriAI/litellm.

==============================  ======================================================================================
report                          tests
==============================  ======================================================================================
#23714, #24682                  test_races: identical amounts of eight processes; mixed amounts and kill -9
#6288                           here: the next call on another replica
#34732, ai-gateway #680         here: parallel requests
#28247, #28283, #40095          test_races: first use by eight processes at once
#27639, PR #30522               test_races: holds of killed processes; here: calls of other workers
#27509                          here: a denial reports held and spent amounts separately; test_amounts: exact sums
#30460                          here: a lost reply; chaos/: lost requests and lost replies
PR #30039                       here: a commit that timed out
#33923, #33323                  test_outages: unexpected store errors; here: an observer that raises an error
#35524                          metering/: prices; here: a reservation with an unknown budget is refused
#34733, #36940                  test_midnight: a commit that crosses midnight keeps its window
#29576, #39726                  test_midnight: callers that retry until midnight; here: denials change no expiry time
#38987                          here: keys expire, also after kill -9
PR #37558, #13245               test_cancellation, test_hold_blocks: a cancelled block commits its accrued spend
#38087, #29937                  here: reads raise an error during an outage; telemetry/: gauges are absent
#8867                           test_amounts: exact sums
litellm-rs                      test_midnight: a late settlement counts in the day of the reservation
docs.rs/eggrd                   test_cancellation, test_hold_blocks: the reported spend is charged
runcycles                       here: commits above the estimate; test_midnight: windows; test_cluster: keys
PostHog #60838, gateway #248    test_cluster: one slot per tenant; test_outages: unexpected store errors
PyrateLimiter                   engine/protocol/test_scripts: SCRIPT FLUSH, restart
envoyproxy/ratelimit #462       test_outages: deadlines
dataspoke #112                  test_outages: policy deny admits nothing; no replica has a cap in its own memory
throttled-py, upstash           engine/protocol/test_scripts: the shipped scripts run and make keys expire
==============================  ======================================================================================
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, StoreUnavailable, UnknownBudget
from ktrdr_budget.money import to_units

from ...helpers.keyspace import counted, dump, immortal_keys, ledger_sum, sums
from ...helpers.processes import workers
from ...helpers.proxy import Proxy
from ...helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00"), Budget("cycles", 10, unit="cycles")]


@pytest.fixture
async def far_limiter(proxy: Proxy) -> AsyncIterator[AsyncBudgetLimiter]:
    """A limiter behind the proxy; the server has already loaded the scripts of the limiter."""
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.5) as made:
        await (await made.reserve("agent", "0.01")).release()
        yield made


async def test_6288_spend_recorded_by_one_replica_counts_in_the_next_call_of_another_replica(limiter, other):
    await limiter.record("agent", "4.90")
    with pytest.raises(BudgetExceeded) as denied:
        await other.reserve("agent", "0.15")
    assert denied.value.spent == Decimal("4.90")
    assert (await other.status("agent")).remaining == Decimal("0.10")


async def test_34732_and_ai_gateway_680_parallel_requests_of_two_replicas_never_exceed_the_cap(limiter, other):
    tries = [replica.reserve("agent", "0.15") for _ in range(100) for replica in (limiter, other)]
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    denied = [outcome for outcome in outcomes if isinstance(outcome, BudgetExceeded)]
    assert len(outcomes) - len(denied) == 33
    assert len(denied) == 167
    assert (await limiter.status("agent")).remaining == Decimal("0.05")


async def test_27639_calls_of_other_workers_do_not_extend_the_hold_of_a_dead_worker(limiter, other):
    """PR #30522: each hold has its own deadline."""
    dead = await limiter.reserve("agent", "1.00", ttl=1)
    traffic = 0

    async def seen_as_unconfirmed() -> bool:
        nonlocal traffic
        hold = await other.reserve("agent", "0.01", ttl=1)
        await hold.extend(ttl=60)
        await hold.commit("0.001")
        traffic += 1
        return (await other.get(dead.id)).state == "unconfirmed"

    await until(seen_as_unconfirmed)
    status = await limiter.status("agent")
    assert traffic > 10
    assert (status.held, status.unconfirmed, status.spent) == (0, Decimal("1.00"), traffic * Decimal("0.001"))


async def test_27509_a_denial_reports_held_and_spent_amounts_separately(limiter):
    await limiter.record("agent", 0.1)
    await limiter.record("agent", 0.2)
    await limiter.reserve("agent", "4.70")  # all headroom, like a request without an amount
    with pytest.raises(BudgetExceeded) as denied:
        await limiter.reserve("agent", "0.15")
    error = denied.value
    assert error.reason == "budget_held"
    assert (error.spent, error.held, error.remaining) == (Decimal("0.30"), Decimal("4.70"), 0)
    assert str(error) == "agent: budget_held ($0.00 remaining, need $0.15)"
    assert error.retry_after is not None and 0 < error.retry_after <= 900


@pytest.mark.parametrize("lost", [1, 2, 3])
async def test_30460_a_retry_after_a_lost_reply_gets_the_same_hold(server, proxy, far_limiter, lost):
    with server.client() as client:
        proxy.lose_replies = lost
        hold = await far_limiter.reserve("agent", "0.15", id="op_1")
        assert (proxy.replies_lost, hold.replayed) == (lost, False), "no replay for its caller"
        assert sums(client)["held"] == to_units("0.15")
        proxy.lose_replies = lost
        await hold.commit("0.07")
        assert proxy.replies_lost == 2 * lost
        assert sums(client) == {"spent": to_units("0.07"), "held": 0, "unconfirmed": 0, "events": 1}


async def test_30460_after_a_reservation_has_timed_out_a_retry_with_the_same_id_is_a_replay(server, proxy, far_limiter):
    proxy.hold_replies()
    with pytest.raises(StoreUnavailable) as unavailable:
        await far_limiter.reserve("agent", "0.15", id="op_1")
    assert unavailable.value.ambiguous
    proxy.release_replies()
    await until(lambda: far_limiter.store_state == "closed")
    hold = await far_limiter.reserve("agent", "0.15", id="op_1")
    assert hold.replayed
    again = await far_limiter.reserve("agent", "0.15", id="op_1")
    assert again.replayed
    with server.client() as client:
        assert sums(client)["held"] == to_units("0.15")
    for replica in (hold, again):
        settlement = await replica.commit("0.07")
        assert settlement.amounts == {"agent": Decimal("0.07")}
    with server.client() as client:
        assert sums(client) == {"spent": to_units("0.07"), "held": 0, "unconfirmed": 0, "events": 1}


async def test_pr_30039_if_a_commit_times_out_and_is_retried_the_spend_counts_once(server, proxy, far_limiter):
    await far_limiter.record("agent", "1.23")
    hold = await far_limiter.reserve("agent", "0.15")
    proxy.hold_replies()
    with pytest.raises(StoreUnavailable):
        await hold.commit("0.07")
    assert not hold.settled
    with server.client() as client:
        assert sums(client)["spent"] == to_units("1.30")
    proxy.release_replies()
    await until(lambda: far_limiter.store_state == "closed")
    settlement = await hold.commit("0.07")
    assert settlement.replayed
    with server.client() as client:
        assert sums(client) == {"spent": to_units("1.30"), "held": 0, "unconfirmed": 0, "events": 2}


async def test_30460_records_growth_and_extensions_are_executed_once_if_replies_are_lost(server, proxy, far_limiter):
    proxy.lose_replies = 2
    await far_limiter.record("agent", "0.02")
    hold = await far_limiter.reserve("agent", "0.15")
    proxy.lose_replies = 2
    await hold.grow("0.10")
    proxy.lose_replies = 2
    hold.accrue("0.30")
    await hold.extend()
    assert proxy.lose_replies == 0
    with server.client() as client:
        assert sums(client) == {"spent": to_units("0.02"), "held": to_units("0.30"), "unconfirmed": 0, "events": 1}
    view = await far_limiter.get(hold.id)
    assert (view.amounts, view.accrued) == ({"agent": Decimal("0.25")}, {"agent": Decimal("0.30")})


async def test_a_lost_request_is_resent(server, proxy, far_limiter):
    proxy.lose_requests = 2
    hold = await far_limiter.reserve("agent", "0.15")
    assert not hold.replayed
    with server.client() as client:
        assert sums(client)["held"] == to_units("0.15")


async def test_33323_an_observer_that_raises_does_not_affect_calls(server, caplog):
    def observer(observation: object) -> None:
        raise RuntimeError("a broken hook")

    async with AsyncBudgetLimiter(server.url, [Budget("agent", "0.20")], observer=observer) as limiter:
        hold = await limiter.reserve("agent", "0.15")
        with pytest.raises(BudgetExceeded):
            await limiter.reserve("agent", "0.15")
        await hold.commit("0.07")
        assert (await limiter.status("agent")).spent == Decimal("0.07")
    assert any(record.levelno == logging.ERROR and "observer failed" in record.message for record in caplog.records)


async def test_35524_a_reservation_with_an_unknown_budget_or_without_an_amount_is_refused(server, limiter):
    with pytest.raises(UnknownBudget):
        await limiter.reserve("team:quant", "0.15")
    with pytest.raises(ValueError, match="no amount"):
        await limiter.reserve("agent")
    with server.client() as client:
        assert dump(client) == {}


async def test_38087_and_29937_reads_raise_an_error_during_an_outage(server, proxy, far_limiter):
    await far_limiter.record("agent", "5.00")
    proxy.hold_replies()
    with pytest.raises(StoreUnavailable):
        await far_limiter.status("agent")
    with pytest.raises(StoreUnavailable):
        await far_limiter.ledger("agent")
    proxy.release_replies()
    await until(lambda: far_limiter.store_state == "closed")
    assert (await far_limiter.status("agent")).remaining == 0


async def test_a_commit_above_the_estimate_is_recorded_in_full(limiter):
    """Reported for runcycles."""
    hold = await limiter.reserve("agent", "0.15")
    settlement = await hold.commit("6.00")
    assert (settlement.overrun, settlement.amounts) == (True, {"agent": Decimal("6.00")})
    status = await limiter.status("agent")
    assert (status.spent, status.remaining, status.overruns) == (Decimal("6.00"), 0, 1)
    with pytest.raises(BudgetExceeded) as denied:
        await limiter.reserve("agent", "0.01")
    assert denied.value.reason == "budget_exhausted"


async def test_the_next_reservation_can_use_the_amounts_of_expired_holds(server, limiter):
    """Reported for runcycles."""
    for policy in ("release", "accrued", "release"):
        await limiter.reserve("agent", "1.60", ttl=1, on_expiry=policy)
    with pytest.raises(BudgetExceeded) as denied:
        await limiter.reserve("agent", "5.00")
    assert (denied.value.reason, denied.value.retry_after) == ("budget_held", 1)
    with server.client() as client:
        newest = max(score for _, score in client.zrange("ktrdr:{default}:due", 0, -1, withscores=True))
        wait_until(lambda: int(client.time()[0]) * 1000 > newest)
    hold = await limiter.reserve("agent", "5.00")
    assert not hold.replayed


# -- #38987 and #29576: keys expire, denials write nothing -------------------------------------------------------------


async def test_38987_every_key_has_an_expiry_after_every_call(server, limiter, other):
    with server.client() as client:

        async def done(step: object) -> object:
            result = await step
            assert immortal_keys(client) == [], step
            return result

        both = {"agent": "0.15", "cycles": 1}
        hold = await done(limiter.reserve(both, id="op_1"))
        hold.accrue("0.05")
        await done(hold.extend())
        await done(hold.grow({"agent": "0.10", "cycles": 1}))
        await done(hold.commit({"agent": "0.07", "cycles": 1}))
        await done(limiter.record("cycles", 1))
        await done((await done(limiter.reserve(both))).release())
        await done(other.release((await done(limiter.reserve(both, id="op_2"))).id, operator=True))
        await done(limiter.commit("op_2", "0.01"))
        await done(limiter.set_limit("agent", "4.00", until="window"))
        await done(limiter.clear_limit("agent"))
        expired = await done(limiter.reserve(both, ttl=1))
        await until(lambda: _is_unconfirmed(limiter, expired.id))
        assert immortal_keys(client) == []
        await done(expired.extend())
        await done(expired.release())
        kinds = {key.split("}:")[1].split(":")[0] for key in client.scan_iter()}
        assert kinds == {"w", "l", "h", "meta", "budgets", "replicas", "changes"}, (
            "the indexes of holds are empty again"
        )


async def _is_unconfirmed(limiter, hold_id: str) -> bool:
    return (await limiter.get(hold_id)).state == "unconfirmed"


def test_38987_every_key_has_an_expiry_after_workers_are_killed_during_requests(server):
    options = {"url": server.url, "limit": "8000", "amounts": ["0.01"], "callers": 8, "ttl": 60, "settle": True}
    with workers("spender.py", 3, options) as spenders, server.client() as client:
        for spender in spenders:
            spender.send(go=True)
        for number, spender in enumerate(spenders, 1):
            wait_until(lambda number=number: sums(client)["events"] > 200 * number)
            spender.kill()
        assert immortal_keys(client) == []
        assert counted(client) == ledger_sum(client) + sums(client)["held"]


async def test_denials_change_no_value_and_no_expiry_time_in_the_store(server, limiter, other):
    """Values and expiry times stay the same, also after denials by another replica."""
    await limiter.record("agent", "1.00", id="op_1")
    await limiter.reserve({"agent": "3.90", "cycles": 9}, id="op_2")
    with server.client() as client:
        before = dump(client)
        for replica in (limiter, other):
            for wanted in ({"agent": "0.11"}, {"agent": "0.05", "cycles": 2}, {"cycles": 2, "agent": "0.05"}):
                with pytest.raises(BudgetExceeded):
                    await replica.reserve(wanted, id="op_denied")
            with pytest.raises(BudgetExceeded):
                await replica.grow("op_2", {"agent": "4.50"})
        assert dump(client) == before
    assert (await limiter.reserve("agent", "0.10", id="op_denied")).replayed is False, "a denial uses up no id"


async def test_a_denial_in_an_empty_store_leaves_the_store_empty(server, limiter):
    with pytest.raises(BudgetExceeded) as denied:
        await limiter.reserve("agent", "5.01")
    assert (denied.value.reason, denied.value.retry_after, denied.value.fits) == ("exceeds_limit", None, 5)
    with server.client() as client:
        assert dump(client) == {}


async def test_a_batch_of_grants_and_denials_writes_only_the_grants(server, limiter):
    tries: list[Callable] = [limiter.reserve("agent", amount) for amount in ("4.00", "2.00", "0.50", "0.60", "0.50")]
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    assert [isinstance(outcome, BudgetExceeded) for outcome in outcomes] == [False, True, False, True, False]
    with server.client() as client:
        assert sums(client)["held"] == to_units("5.00")
        assert len(list(client.scan_iter("*:h:*"))) == 3
