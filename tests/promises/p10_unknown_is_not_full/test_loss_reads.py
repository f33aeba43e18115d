"""Reads after a data loss return the former figures or raise an error; they show no empty budget (P10, P13)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetTracker, StoreUnavailable
from ktrdr_budget.audit import Auditor
from ktrdr_budget.telemetry.metrics import LimiterMetrics

from ...helpers.patience import away, hurried
from ...helpers.repairs import recovery_prolonged, refused_during_repair
from ...helpers.waiting import until

BUDGETS = [Budget("agent", "5.00"), Budget("calls", 100, unit="requests")]


def lose_all(client, limiter: AsyncBudgetLimiter) -> None:
    client.flushall()


def lose_the_last_write(client, limiter: AsyncBudgetLimiter) -> None:
    """A failover to a lagging replica: the epoch is the same, and the counter of acknowledged writes is lower."""
    delete_windows(client, limiter)
    client.delete(*client.scan_iter(f"{limiter.keys.hold_prefix}*"), limiter.keys.due)
    client.hincrby(limiter.keys.meta, f"r:{limiter.replica_id}", -1)


def delete_windows(client, limiter: AsyncBudgetLimiter) -> None:
    """Remove all windows and ledgers, as if none had been used."""
    client.delete(*client.scan_iter(f"{limiter.keys.prefix}[wl]:*"))
    client.delete(limiter.keys.budgets, limiter.keys.expiries)


async def _status(limiter: AsyncBudgetLimiter) -> object:
    status = await limiter.status("agent")
    return status.spent, status.held, status.remaining


async def _statuses(limiter: AsyncBudgetLimiter) -> object:
    return [(status.budget, status.spent, status.held, status.events) for status in await limiter.statuses()]


async def _get(limiter: AsyncBudgetLimiter) -> object:
    return await limiter.get("op_open"), (await limiter.get("op_done")).charged


async def _holds(limiter: AsyncBudgetLimiter) -> object:
    return await limiter.holds("agent")


async def _ledger(limiter: AsyncBudgetLimiter) -> object:
    return sorted((entry.kind, entry.hold_id, entry.amount) for entry in (await limiter.ledger("agent")).items)


@pytest.mark.parametrize("loss", [lose_all, lose_the_last_write])
@pytest.mark.parametrize("read", [_status, _statuses, _get, _holds, _ledger])
async def test_the_first_read_after_a_data_loss_returns_the_figures_from_before_the_loss(
    limiter, client, read: Callable[[AsyncBudgetLimiter], Awaitable[object]], loss
):
    await limiter.record({"agent": "1.00", "calls": 3}, id="op_record")
    await (await limiter.reserve("agent", "0.50", id="op_done")).commit("0.50")
    await limiter.reserve("agent", "0.15", id="op_open")
    before = await read(limiter)
    loss(client, limiter)
    assert await read(limiter) == before
    assert limiter.losses == 1


async def test_a_replica_that_only_reads_detects_a_data_loss(server, client, limiter):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as writer:
        await writer.record("agent", "4.00")
        assert (await limiter.status("agent")).spent == 4
    client.flushall()  # no running replica has it in its journal
    status = await limiter.status("agent")
    assert (status.spent, limiter.losses) == (0, 1)
    assert status.recovering_until is not None


async def test_reads_that_require_complete_figures_raise_an_error_until_the_recovery_ends(server, client):
    """A new replica cannot detect the loss itself, but it reads from the store that a recovery is in progress."""
    async with AsyncBudgetLimiter(server.url, BUDGETS) as old:
        await old.record("agent", "4.00")
        client.flushall()
        assert (await old.status("agent")).spent == 4
        async with AsyncBudgetLimiter(server.url, BUDGETS) as new:
            delete_windows(client, new)  # as if the old replica had not replayed yet
            assert (await new.status("agent")).recovering_until
            with recovery_prolonged(client), away(server.url), hurried(new, 0.1):
                for read in (
                    lambda: new.status("agent", complete=True),
                    lambda: new.holds("agent"),
                    lambda: new.ledger("agent"),
                ):
                    assert "being repaired; try again in" in str(await refused_during_repair(read))
            status = await new.status("agent", complete=True)  # waits for the end of the recovery
            assert status.recovering_until is None


async def test_gauges_are_absent_after_a_data_loss_until_the_figures_are_restored(server, client):
    metrics = LimiterMetrics()
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        metrics.watch(limiter)
        await limiter.record("agent", "4.00")
        for timeout_s in (0.05, None):
            client.flushall()
            if timeout_s is None:
                text, _ = await metrics.render()
                assert b"agent_budget_remaining_dollars 1.0" in text
            else:
                with away(server.url), hurried(limiter, timeout_s):
                    text, _ = await metrics.render()
                assert b"\nagent_budget_remaining_dollars" not in text
                assert b"\nktrdr_budget_spent{" not in text


def test_a_tracker_returns_the_former_figures_after_a_data_loss(server):
    with BudgetTracker("5.00", url=server.url) as tracker:
        tracker.record_spend("4.90", "op_1")
        with server.client() as client:
            client.flushall()
        assert tracker.can_spend(0.15) == (False, "budget_exhausted ($0.10 remaining, need $0.15)")
        assert (tracker.get_today_spend(), tracker.get_remaining()) == (4.9, 0.1)


async def test_a_read_ends_at_its_deadline_if_the_repair_of_a_data_loss_fails(server, limiter, client, monkeypatch):
    await limiter.record("agent", "1.00")

    async def fail(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(limiter.engine.dispatcher.background, "send", fail)
    client.flushall()
    with away(server.url), hurried(limiter, 0.3):
        for read in (lambda: limiter.status("agent"), lambda: limiter.get("op_1"), lambda: limiter.ledger("agent")):
            assert "it lost writes and is being repaired" in str(await refused_during_repair(read))
    await until(lambda: limiter.store_state == "closed")  # the store replies
    monkeypatch.undo()
    await until(lambda: limiter.losses == 1)
    assert (await limiter.status("agent")).spent == Decimal("1.00")


async def test_after_a_data_loss_an_audit_raises_an_error_until_the_store_is_repaired(server, limiter, client):
    await limiter.record("agent", "1.00")
    with Auditor(server.url) as auditor:
        [report] = await asyncio.to_thread(auditor.check)
        assert report.adds_up
        window = [(report.budget, report.window)]
        client.flushall()
        with pytest.raises(StoreUnavailable, match="data loss detected"):
            await asyncio.to_thread(auditor.check, windows=window)
        await limiter.status("agent")
        [report] = await asyncio.to_thread(auditor.check, windows=window)
        assert (report.adds_up, report.spent) == (True, 10**9)
