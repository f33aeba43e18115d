"""If the reply to a settlement is lost, the sending replica counts and logs the spend once, when it is acknowledged."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, StoreUnavailable
from ktrdr_budget.engine.batching.pending import Observation
from ktrdr_budget.telemetry.agent_metrics import AgentMetrics
from ktrdr_budget.telemetry.budget_log import BudgetLog
from ktrdr_budget.telemetry.metrics import LimiterMetrics
from ktrdr_budget.telemetry.outcomes import combined

from ..helpers.proxy import Proxy
from ..helpers.waiting import until

pytestmark = pytest.mark.usefixtures("info_log")

BUDGETS = [Budget("agent", "5.00"), Budget("calls", 100, unit="requests")]


class Replica:
    """A limiter with its metrics and its log of spend."""

    def __init__(self, url: str, caplog: pytest.LogCaptureFixture, timeout: float) -> None:
        self.metrics, self.log = LimiterMetrics(), BudgetLog()
        self.agent = AgentMetrics(self.metrics.registry)
        self.operations: list[str] = []
        self._caplog = caplog
        observer = combined(self.metrics.observe, self.agent.observe, self.log.observe, self._seen)
        self.limiter = AsyncBudgetLimiter(url, BUDGETS, timeout=timeout, observer=observer)
        self.metrics.watch(self.limiter)
        self.log.watch(self.limiter)

    def _seen(self, observation: Observation) -> None:
        self.operations.append(observation.operation)

    def counted(self, name: str = "ktrdr_budget_spend_total", **labels: str) -> float:
        found = self.metrics.registry.get_sample_value(name, labels)
        return round(found or 0.0, 9)

    @property
    def spent(self) -> tuple[float, float]:
        """The dollars and the requests that the metrics have counted."""
        dollars = self.counted(budget="agent", unit="usd")
        assert self.counted("agent_budget_spend_total") == dollars
        return dollars, self.counted(budget="calls", unit="requests")

    @property
    async def logged(self) -> list[tuple[str, float]]:
        await self.log.drain()
        records = [record for record in self._caplog.records if record.message.startswith("Budget spend recorded: ")]
        return [(record.operation_id, record.amount) for record in records]


@asynccontextmanager
async def replica_of(url: str, caplog: pytest.LogCaptureFixture, timeout: float = 0.2) -> AsyncIterator[Replica]:
    made = Replica(url, caplog, timeout)
    async with made.limiter:
        yield made


async def loses(proxy: Proxy, call, fate: str) -> None:
    proxy.lose_all(fate)
    with pytest.raises(StoreUnavailable):
        await call


async def resolved(proxy: Proxy, limiter: AsyncBudgetLimiter) -> None:
    proxy.lose_all(None)
    await until(lambda: limiter.unresolved == 0)


def resolves_nothing(limiter: AsyncBudgetLimiter) -> None:
    """Disable the background resolution of unknown outcomes, except while the limiter closes."""
    backlog = limiter.engine.dispatcher.replayer
    backlog.hasten = backlog.schedule = lambda: None


async def reserved(limiter: AsyncBudgetLimiter, id: str):
    """Repeat a reservation until the store grants it."""

    async def granted() -> object:
        try:
            return await limiter.reserve({"agent": "0.15", "calls": 1}, id=id)
        except StoreUnavailable:
            return None

    found = await until(granted)
    await until(lambda: limiter.unresolved == 0)
    return found


@pytest.mark.parametrize("fate", ["reply", "request"])
async def test_a_commit_resent_in_the_background_is_counted_and_logged_once(proxy, caplog, fate):
    async with replica_of(proxy.url, caplog) as replica:
        hold = await reserved(replica.limiter, "op_1")
        await loses(proxy, hold.commit({"agent": "0.07", "calls": 2}), fate)
        assert replica.spent == (0, 0)
        await resolved(proxy, replica.limiter)
        assert replica.spent == (0.07, 2)
        assert (await hold.commit({"agent": "0.07", "calls": 2})).replayed
        assert replica.spent == (0.07, 2)
        assert await replica.logged == [("op_1", 0.07)]
        assert replica.operations.count("resolve") == 1
        assert replica.counted("ktrdr_budget_call_seconds_count", operation="resolve") == 0


@pytest.mark.parametrize("fate", ["reply", "request"])
async def test_recorded_spend_resent_in_the_background_is_counted_and_logged_once(proxy, caplog, fate):
    async with replica_of(proxy.url, caplog) as replica:
        await reserved(replica.limiter, "op_1")
        await loses(proxy, replica.limiter.record("agent", "0.02", id="r-1"), fate)
        await resolved(proxy, replica.limiter)
        assert (await replica.limiter.record("agent", "0.02", id="r-1")).replayed
        assert replica.spent == (0.02, 0)
        assert await replica.logged == [("r-1", 0.02)]


async def test_if_the_caller_retries_a_commit_after_a_lost_reply_the_spend_is_counted_and_logged_once(proxy, caplog):
    async with replica_of(proxy.url, caplog) as replica:
        hold = await reserved(replica.limiter, "op_1")
        resolves_nothing(replica.limiter)
        await loses(proxy, hold.commit({"agent": "0.07", "calls": 2}), "reply")
        proxy.lose_all(None)
        await until(lambda: replica.limiter.store_state == "closed")
        for _ in range(2):
            assert (await hold.commit({"agent": "0.07", "calls": 2})).replayed
        assert replica.limiter.resolved["retried"] == 1
        assert replica.spent == (0.07, 2)
        assert await replica.logged == [("op_1", 0.07)]


async def test_a_commit_resent_after_a_lost_reply_is_counted_and_logged_once(proxy, caplog):
    async with replica_of(proxy.url, caplog, timeout=20) as replica:
        hold = await replica.limiter.reserve("agent", "0.15", id="op_1")
        fates = iter(["reply"])
        proxy.fate = lambda: next(fates, None)
        await hold.commit("0.07")
        assert next(fates, None) is None
        assert replica.spent == (0.07, 0)
        fates = iter(["reply"])
        assert (await hold.commit("0.07")).replayed
        assert next(fates, None) is None
        assert replica.spent == (0.07, 0)
        assert await replica.logged == [("op_1", 0.07)]


async def test_if_two_replicas_commit_the_same_hold_only_the_first_replica_counts_the_spend(proxy, server, caplog):
    async with replica_of(proxy.url, caplog) as replica, replica_of(server.url, caplog, timeout=20) as other:
        hold = await reserved(replica.limiter, "op_1")
        await loses(proxy, hold.commit({"agent": "0.07", "calls": 2}), "request")
        assert not (await other.limiter.commit("op_1", {"agent": "0.07", "calls": 2})).replayed
        await resolved(proxy, replica.limiter)
        assert (replica.spent, other.spent) == ((0, 0), (0.07, 2))
        assert await other.logged == [("op_1", 0.07)]


async def test_if_a_block_ends_during_an_outage_the_spend_is_counted_and_logged_after_the_outage(proxy, caplog):
    async with replica_of(proxy.url, caplog) as replica:
        await reserved(replica.limiter, "op_0")
        with pytest.raises(StoreUnavailable):
            async with replica.limiter.hold("agent", "0.15", id="op_1") as hold:
                hold.accrue("0.07")
                proxy.lose_all("request")
        await resolved(proxy, replica.limiter)
        assert replica.spent == (0.07, 0)
        assert await replica.logged == [("op_1", 0.07)]


async def test_a_release_with_a_lost_reply_is_not_counted_as_spend(proxy, caplog):
    async with replica_of(proxy.url, caplog) as replica:
        hold = await reserved(replica.limiter, "op_1")
        await loses(proxy, hold.release(), "reply")
        await resolved(proxy, replica.limiter)
        assert (replica.spent, await replica.logged) == ((0, 0), [])


async def test_spend_recorded_while_the_limiter_closes_is_logged(proxy, caplog):
    async with replica_of(proxy.url, caplog) as replica:
        hold = await reserved(replica.limiter, "op_1")
        resolves_nothing(replica.limiter)
        await loses(proxy, hold.commit("0.07"), "request")
        proxy.lose_all(None)
        await until(lambda: replica.limiter.store_state == "closed")
        assert replica.limiter.unresolved == 1
    assert await replica.logged == [("op_1", 0.07)]
