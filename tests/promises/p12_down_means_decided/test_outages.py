"""During an outage each call ends within its deadline, with an explicit outcome by policy (P12)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import traceback
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    BudgetError,
    BudgetExceeded,
    BudgetLimiter,
    HoldConflict,
    StoreUnavailable,
)
from ktrdr_budget.engine.batching import replay
from ktrdr_budget.engine.calls.reserve import reserve
from ktrdr_budget.engine.protocol.operations import Release
from ktrdr_budget.engine.protocol.replies import Conflict
from ktrdr_budget.engine.replica.journal import AGE_MAX_MS
from ktrdr_budget.errors import StoreError
from ktrdr_budget.money import to_units

from ...helpers.breakers import open_breaker
from ...helpers.keyspace import immortal_keys, ledger_sum, sums, window_key
from ...helpers.patience import away
from ...helpers.proxy import Proxy
from ...helpers.stopwatch import Stopwatch
from ...helpers.waiting import until, wait_until

BUDGETS = [Budget("agent", "5.00"), Budget("team", "5.00")]
TIMEOUT_S = 0.2
GRACE_S = 0.8


class Outage:
    """An outage: the server is killed at the beginning and restarted at the end."""

    def __init__(self, server) -> None:
        self.server = server

    def begin(self) -> None:
        self.server.kill()

    def end(self) -> None:
        self.server.start()


class Hang(Outage):
    """The server is stopped with SIGSTOP: it accepts connections, but does not reply."""

    def begin(self) -> None:
        self.server.pause()

    def end(self) -> None:
        self.server.resume()


@pytest.fixture(params=[Outage, Hang])
def outage(request: pytest.FixtureRequest, own_server):
    made = request.param(own_server)
    yield made
    if own_server.process is not None:
        own_server.resume()


def every_call(limiter: AsyncBudgetLimiter, hold) -> dict[str, Callable]:
    return {
        "reserve": lambda: limiter.reserve("agent", "0.15"),
        "reserve with an id": lambda: limiter.reserve("agent", "0.15", id="op_x"),
        "record": lambda: limiter.record("agent", "0.02"),
        "extend": hold.extend,
        "grow": lambda: hold.grow("0.10"),
        "commit": lambda: hold.commit("0.07"),
        "release": hold.release,
        "commit by id": lambda: limiter.commit("op_1", "0.07"),
        "release by id": lambda: limiter.release("op_1"),
        "extend by id": lambda: limiter.extend("op_1", 60),
        "status": lambda: limiter.status("agent"),
        "statuses": limiter.statuses,
        "get": lambda: limiter.get("op_1"),
        "holds": lambda: limiter.holds("agent"),
        "ledger": lambda: limiter.ledger("agent"),
        "set_limit": lambda: limiter.set_limit("agent", "6.00"),
        "clear_limit": lambda: limiter.clear_limit("agent"),
    }


@pytest.fixture
def stopwatch():
    with Stopwatch() as running:
        yield running


async def ends_in_time(stopwatch: Stopwatch, call: Callable) -> str | None:
    """Make a call during an outage. Return what was wrong with its duration or its error, or ``None``."""
    started_s = stopwatch.seconds
    try:
        await call()
    except StoreUnavailable as error:
        took_s = stopwatch.seconds - started_s
        if isinstance(error, StoreError):
            return f"an error reply: {error}"
        return None if took_s <= TIMEOUT_S + GRACE_S else f"took {took_s:.3f} s"
    except BaseException as error:
        return repr(error)
    return "no error"


async def test_462_every_call_ends_within_its_deadline_during_an_outage(outage, stopwatch):
    """envoyproxy/ratelimit #462: no call waits ten seconds. The calls run one after another, and each is timed."""
    async with AsyncBudgetLimiter(outage.server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        hold = await limiter.reserve("agent", "0.15", id="op_1")
        outage.begin()
        wrong = {name: await ends_in_time(stopwatch, call) for name, call in every_call(limiter, hold).items()}
        assert {name: fault for name, fault in wrong.items() if fault} == {}
        outage.end()
        await until(lambda: _is_reachable(limiter))
        settlement = await hold.commit("0.07")
        assert settlement.amounts == {"agent": Decimal("0.07")}
        assert (await limiter.reserve("agent", "0.15")).cap_checked


async def _is_reachable(limiter) -> bool:
    try:
        await limiter.status("agent")
    except StoreUnavailable:
        return False
    return True


async def test_concurrent_calls_end_within_their_deadline_during_an_outage(outage, stopwatch):
    async with AsyncBudgetLimiter(outage.server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        hold = await limiter.reserve("agent", "0.15", id="op_1")
        outage.begin()
        calls = every_call(limiter, hold)
        tries = [*calls.values(), *[calls["reserve"]] * 400, *[calls["record"]] * 100]
        faults = await asyncio.gather(*(ends_in_time(stopwatch, call) for call in tries))
        assert [fault for fault in faults if fault] == []
        outage.end()
        await until(lambda: _is_reachable(limiter))


async def test_each_call_gets_its_own_reply_after_the_server_has_hung(own_server):
    """A late reply must not count as the reply to the next call."""
    hang = Hang(own_server)
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.1) as limiter:
        for number in range(1, 6):
            hang.begin()
            with pytest.raises(StoreUnavailable):
                await limiter.reserve("agent", "0.15", id=f"late_{number}")
            with pytest.raises(StoreUnavailable):
                await limiter.status("agent")
            hang.end()
            await until(lambda: _is_reachable(limiter))
            hold = await limiter.reserve("team", f"0.{number}", id=f"op_{number}")
            assert (hold.id, hold.amounts) == (f"op_{number}", {"team": Decimal(f"0.{number}0")})
            assert (await limiter.get(hold.id)).amounts == hold.amounts
            assert (await limiter.status("team")).budget == "team"


def test_462_calls_of_the_sync_limiter_end_within_their_deadline_during_an_outage(outage, stopwatch):
    with BudgetLimiter(outage.server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        hold = limiter.reserve("agent", "0.15")
        outage.begin()
        faults: list[object] = []

        def call(work: Callable) -> None:
            started_s = stopwatch.seconds
            with pytest.raises(StoreUnavailable):
                work()
            if (took_s := stopwatch.seconds - started_s) > TIMEOUT_S + GRACE_S:
                faults.append(took_s)

        works = [
            lambda: limiter.reserve("agent", "0.15"),
            lambda: hold.commit("0.07"),
            lambda: limiter.status("agent"),
        ] * 4
        threads = [threading.Thread(target=call, args=[work]) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        outage.end()
        wait_until(lambda: limiter.store_state == "closed")
        assert hold.commit("0.07").amounts == {"agent": Decimal("0.07")}


@pytest.mark.parametrize("kind", ["refused", "no socket"])
async def test_a_limiter_can_start_while_the_store_is_unreachable(
    tmp_path: Path, free_tcp_port: int, kind: str, caplog, stopwatch
):
    url = f"redis://127.0.0.1:{free_tcp_port}" if kind == "refused" else f"unix://{tmp_path}/none"
    async with AsyncBudgetLimiter(url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        assert "starting without the store" in caplog.text
        assert await ends_in_time(stopwatch, lambda: limiter.reserve("agent", "0.15")) is None
        with pytest.raises(StoreUnavailable) as unavailable:
            await limiter.record("agent", "0.15")
        assert not unavailable.value.ambiguous, "nothing was sent"
        assert limiter.deferred == 0


async def test_a_call_succeeds_if_the_store_starts_before_the_deadline_of_the_call(own_server):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=60.0) as limiter:
        own_server.kill()
        call = asyncio.create_task(limiter.reserve("agent", "0.15"))
        reading = asyncio.create_task(limiter.status("agent"))
        done, _ = await asyncio.wait({call, reading}, timeout=0.1)
        assert not done
        await asyncio.to_thread(own_server.start)
        assert (await call).cap_checked
        assert (await reading).budget == "agent"


async def test_112_nothing_is_admitted_during_an_outage_under_policy_deny(outage):
    """dataspoke #112: if each replica kept a cap in its own memory, each would admit up to the cap."""
    replicas = [AsyncBudgetLimiter(outage.server.url, BUDGETS, timeout=0.1) for _ in range(3)]
    for replica in replicas:
        await replica.start()
    outage.begin()
    tries = [replica.reserve("agent", "0.01") for replica in replicas for _ in range(10)]
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
    outage.end()
    for replica in replicas:
        await replica.close()


async def test_a_limiter_closes_in_time_during_an_outage(outage):
    limiter = AsyncBudgetLimiter(outage.server.url, BUDGETS, timeout=TIMEOUT_S)
    hold = await limiter.reserve("agent", "0.15")
    outage.begin()
    commit = asyncio.create_task(hold.commit("0.07"))
    await asyncio.sleep(0)
    with Stopwatch() as took:
        await limiter.close()
    assert took.seconds < 3 * TIMEOUT_S + GRACE_S
    with pytest.raises(BudgetError):
        await commit
    outage.end()


async def test_if_a_hold_expires_during_an_outage_the_next_heartbeat_reopens_the_hold(outage):
    async with AsyncBudgetLimiter(outage.server.url, BUDGETS, timeout=TIMEOUT_S) as limiter:
        async with limiter.hold("agent", "0.15", id="op_1", ttl=1) as hold:
            hold.accrue("0.05")
            outage.begin()
            ends = time.monotonic() + 1.2
            await until(lambda: time.monotonic() > ends)
            outage.end()
            await until(lambda: _is_open_since(limiter, hold.expires_at))
        with outage.server.client() as client:
            assert sums(client)["spent"] == ledger_sum(client) == to_units("0.05")


async def _is_open_since(limiter, expires_at) -> bool:
    try:
        view = await limiter.get("op_1")
    except StoreUnavailable:
        return False
    return view.state == "open" and view.accrued == {"agent": Decimal("0.05")} and view.expires_at >= expires_at


# -- policy allow ------------------------------------------------------------------------------------------------------


async def test_the_spend_of_holds_admitted_by_policy_allow_is_recorded_once_after_the_outage(own_server, caplog):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter:
        before = await limiter.reserve("agent", "1.00", id="before")
        own_server.kill()
        unguarded = await limiter.reserve("agent", "0.15", id="during")
        released = await limiter.reserve("agent", "0.20")
        assert (before.cap_checked, unguarded.cap_checked) == (True, False)
        unguarded.accrue("0.03")
        await unguarded.extend()
        assert [await unguarded.commit("0.07"), await before.commit("0.90")] == [
            _deferred("during", "0.07"),
            _deferred("before", "0.90"),
        ]
        assert (await released.release()).deferred
        assert (await limiter.record("agent", "0.02", id="spent")).deferred
        assert limiter.deferred == 4
        assert "during" in caplog.text, "an unguarded admission is logged"
        own_server.start()
        await until(lambda: limiter.deferred == 0)
        with own_server.client() as client:
            expected = {"spent": to_units("0.99"), "held": 0, "unconfirmed": 0, "events": 3}
            assert sums(client) == expected
            assert ledger_sum(client) == expected["spent"]
            assert immortal_keys(client) == []
            assert (await unguarded.commit("0.07")).replayed
            assert (await limiter.record("agent", "0.02", id="spent")).replayed
            assert sums(client) == expected


def _deferred(hold_id: str, amount: str):
    from ktrdr_budget import Settlement

    return Settlement(hold_id, "committed", {"agent": Decimal(amount)}, deferred=True)


async def test_deferred_spend_is_recorded_although_the_store_refuses_deferred_spend_of_another_budget(own_server):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter:
        await limiter.record("agent", "0.01")
        own_server.kill()
        for number in range(3):
            await limiter.record("team", "0.01", id=f"team_{number}")
            await limiter.record("agent", "0.01", id=f"agent_{number}")
        own_server.start()
        with own_server.client() as client:
            client.set(window_key(client, "team"), "no window")
            await until(lambda: sums(client)["spent"] == to_units("0.04"))
            await until(lambda: limiter.deferred == 3)
            client.delete(window_key(client, "team"))
            await until(lambda: limiter.deferred == 0)
            assert sums(client, "team")["spent"] == to_units("0.03")


async def test_under_policy_allow_a_grant_with_a_lost_reply_counts_once(server, tmp_path_factory):
    path = Path(tmp_path_factory.mktemp("p")) / "s"
    async with (
        Proxy(server.socket_path, path) as proxy,
        AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter,
    ):
        await limiter.record("agent", 0)
        proxy.hold_replies()
        hold = await limiter.reserve("agent", "0.15")
        assert not hold.cap_checked
        with server.client() as client:
            assert sums(client)["held"] == to_units("0.15")
            assert (await hold.commit("0.07")).deferred
            assert (await limiter.record("agent", "0.02")).deferred
            assert limiter.deferred == 2, "without another request"
            assert sums(client)["spent"] == 0
            proxy.release_replies()
            await until(lambda: limiter.deferred == 0)
            assert sums(client) == {"spent": to_units("0.09"), "held": 0, "unconfirmed": 0, "events": 3}


async def test_under_policy_allow_a_second_reservation_of_an_id_is_a_replay_or_a_conflict(own_server):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter:
        await limiter.record("agent", "0.01")
        own_server.kill()
        hold, at_once = await asyncio.gather(*(limiter.reserve("agent", "0.15", id="op_1") for _ in range(2)))
        assert (hold.replayed, at_once.replayed, at_once.cap_checked) == (False, True, False)
        hold.accrue("0.03")
        for _ in range(2):  # during and after the outage
            again = await limiter.reserve("agent", "0.15", id="op_1")
            assert (again.replayed, again.state, again.accrued) == (True, "open", {"agent": Decimal("0.03")})
            for other in ({"amount": "0.16"}, {"amount": "0.15", "on_expiry": "release"}):
                with pytest.raises(HoldConflict):
                    await limiter.reserve("agent", id="op_1", **other)
            if own_server.process is None:
                own_server.start()
                await until(lambda: limiter.store_state == "closed")
        await again.commit("0.07")
        await until(lambda: limiter.deferred == 0)
        with own_server.client() as client:
            assert sums(client)["spent"] == to_units("0.08")
            assert sums(client)["held"] == 0


@pytest.mark.parametrize("deferred", [True, False])
async def test_under_policy_allow_a_late_reservation_is_refused_if_its_hold_was_already_released(proxy, deferred):
    """Policy `allow` admits the hold, and the caller releases it. The reservation reaches the store only after that."""
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter:
        await limiter.record("agent", "0.01")
        flow = reserve(limiter.engine.context, "agent", "0.15", "op_1", 900, "charge", "", "")
        late = next(flow)
        flow.close()
        proxy.fate = lambda: "request"
        with away(proxy.url):
            hold = await limiter.reserve("agent", "0.15", id="op_1")
            assert not hold.cap_checked
            if deferred:
                assert (await hold.release()).deferred
        proxy.fate = lambda: None
        await until(lambda: limiter.store_state == "closed")
        if not deferred:
            assert (await hold.release()).state == "released"
        await until(lambda: limiter.deferred == 0)
        _, [reply] = await limiter.engine.dispatcher.background.send([late])
        assert isinstance(reply, Conflict)
        assert (await limiter.status("agent")).held == 0


async def test_under_policy_allow_a_reservation_is_released_if_its_caller_is_cancelled(proxy):
    async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter:
        await limiter.record("agent", "0.01")
        proxy.hold_replies()
        task = asyncio.create_task(limiter.reserve("agent", "0.15", id="op_1"))
        await asyncio.sleep(0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: limiter.unresolved == 1)
        proxy.release_replies()
        await until(lambda: limiter.unresolved == 0)
        assert (await limiter.status("agent")).held == 0


async def test_policy_allow_defers_commits_by_id_only_for_holds_of_the_same_replica(own_server):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter:
        await limiter.reserve({"agent": "0.15", "team": "0.10"}, id="op_1")
        own_server.kill()
        settled = await limiter.commit("op_1", {"agent": "0.07", "team": "0.02"})
        assert settled.deferred
        with pytest.raises(StoreUnavailable):  # the windows of another replica's hold are unknown
            await limiter.commit("op_2", "0.07")
        own_server.start()
        await until(lambda: limiter.deferred == 0)
        with own_server.client() as client:
            assert (sums(client)["spent"], sums(client, "team")["spent"]) == (to_units("0.07"), to_units("0.02"))
            assert sums(client)["held"] == 0


async def test_an_old_settlement_is_not_resent_if_the_store_may_have_executed_the_settlement(
    server, tmp_path_factory, caplog
):
    """After a day the store may no longer have the id and would charge twice. Unsent spend has no maximum age."""
    async with (
        Proxy(server.socket_path, Path(tmp_path_factory.mktemp("p")) / "s") as proxy,
        AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.2, on_store_error="allow") as limiter,
    ):
        hold = await limiter.reserve("agent", "0.15")
        proxy.hold_replies()
        assert (await hold.commit("0.07")).deferred
        assert (await limiter.record("agent", "0.02", id="unsent")).deferred
        [doubtful] = [entry for entry in limiter.engine.outbox if entry.maybe_executed_us is not None]
        assert doubtful.hold_id == hold.id
        doubtful.maybe_executed_us -= AGE_MAX_MS * 1000
        with server.client() as client:
            client.delete(limiter.keys.hold(hold.id))
            proxy.release_replies()
            await until(lambda: limiter.deferred == 0)
            assert sums(client)["spent"] == to_units("0.09")
        assert limiter.engine.outbox.deferred_lost == 1
        assert f"dropped a request with id {hold.id} (deferred): too old to resend safely" in caplog.text


async def test_under_policy_allow_a_reachable_store_denies_amounts_above_the_limit(server):
    async with AsyncBudgetLimiter(server.url, BUDGETS, on_store_error="allow") as limiter:
        with pytest.raises(BudgetExceeded):
            await limiter.reserve("agent", "5.01")


async def test_an_error_is_logged_if_deferred_spend_is_unsent_when_the_limiter_closes(own_server, caplog):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.1, on_store_error="allow") as limiter:
        await limiter.record("agent", "0.01")
        own_server.kill()
        await limiter.record("agent", "0.02")
    assert any(record.levelname == "ERROR" and "never sent" in record.message for record in caplog.records)


async def test_closing_the_limiter_sends_the_remaining_deferred_spend(server, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(replay, "_BATCH_OPS", 1)
    path = Path(tmp_path_factory.mktemp("p")) / "s"
    async with Proxy(server.socket_path, path) as proxy:
        async with AsyncBudgetLimiter(proxy.url, BUDGETS, timeout=0.3, on_store_error="allow") as limiter:
            await limiter.record("agent", "0.01")
            proxy.cut()
            for _ in range(60):
                await limiter.record("agent", "0.01")
            proxy.delay_s = 0.01
            proxy.mend()
            await until(lambda: 0 < limiter.deferred < 60)
        assert limiter.deferred == 0
    with server.client() as client:
        assert sums(client)["spent"] == ledger_sum(client) == to_units("0.61")


async def test_closing_the_limiter_closes_its_connections_even_if_the_last_replay_fails(own_server, monkeypatch):
    limiter = AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.2, on_store_error="allow")
    hold = await limiter.reserve("agent", "0.15")
    closed = []
    close = limiter.engine.store.close

    async def observe() -> None:
        closed.append(not limiter.engine.dispatcher.background.tasks)
        await close()

    async def fail() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(limiter.engine.store, "close", observe)
    monkeypatch.setattr(limiter.engine.dispatcher.replayer, "drain", fail)
    limiter.engine.policy.defer(Release(hold.id, limiter.keys.hold(hold.id), hold.window_list))
    with pytest.raises(ZeroDivisionError):
        await limiter.close()
    assert closed == [True]


async def test_calls_that_wait_for_a_repair_raise_an_error_when_the_limiter_closes(server):
    """During a repair no connection sends the waiting calls."""
    limiter = AsyncBudgetLimiter(server.url, BUDGETS, timeout=0.2)
    await limiter.record("agent", "0.01")
    limiter.engine.dispatcher.repair.active = True
    limiter.engine.dispatcher.deadlines.watch = lambda *_: None
    calls = [asyncio.ensure_future(limiter.record("agent", "0.01")), asyncio.ensure_future(limiter.reserve("agent", 1))]
    await asyncio.sleep(0)
    await limiter.close()
    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}


# -- a store that replies with an error --------------------------------------------------------------------------------


def wrong_type(client) -> None:
    client.set(window_key(client), "not a hash")


def out_of_memory(client) -> None:
    client.config_set("maxmemory", "1mb")


def no_permission(client) -> None:
    client.acl_setuser("default", enabled=True, nopass=True, keys=["else*"], categories=["+@all"], reset=True)


def not_our_schema(client) -> None:
    client.hset("ktrdr:{default}:meta", "epoch", "999.of-another-release")


@pytest.mark.parametrize("policy", ["deny", "allow"])
@pytest.mark.parametrize("break_it", [wrong_type, out_of_memory, no_permission, not_our_schema])
async def test_33923_nothing_is_admitted_if_the_store_replies_with_an_unexpected_error(
    start_server: Callable, break_it: Callable, policy: str
):
    """#33323, PostHog #60838, spring-cloud-gateway #248: even policy `allow` admits nothing."""
    broken = start_server()
    with broken.client() as client:
        async with AsyncBudgetLimiter(broken.url, BUDGETS, on_store_error=policy) as limiter:
            break_it(client)
            for call in (
                lambda: limiter.reserve("agent", "0.15"),
                lambda: limiter.record("agent", "0.02"),
                lambda: limiter.reserve({"team": "0.15", "agent": "0.15"}),
            ):
                with pytest.raises(StoreError) as refused:
                    await call()
                assert str(refused.value).count("\n") == 0
            assert limiter.deferred == 0
    broken.kill()


async def test_33923_the_figures_of_a_budget_are_right_even_if_the_window_of_another_budget_is_unusable(server):
    """A call in the same batch may fail; then a second attempt with the same id succeeds."""
    with server.client() as client:
        wrong_type(client)
        async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
            tries = [limiter.reserve(name, "0.15", id=name) for name in ("team", "agent")]
            outcomes = await asyncio.gather(*tries, return_exceptions=True)
            assert isinstance(outcomes[1], StoreError)
            hold = await limiter.reserve("team", "0.15", id="team")
            assert sums(client, "team")["held"] == to_units("0.15")
            await hold.commit("0.07")
            assert sums(client, "team") == {"spent": to_units("0.07"), "held": 0, "unconfirmed": 0, "events": 1}


async def test_a_limiter_without_permissions_in_the_store_does_not_start(start_server: Callable):
    guarded = start_server()
    with guarded.client() as client:
        no_permission(client)
        with pytest.raises(StoreError, match="[Nn]o permissions"):
            async with AsyncBudgetLimiter(guarded.url, BUDGETS, on_store_error="allow"):
                pytest.fail("the limiter started")
        with pytest.raises(StoreError, match="[Nn]o permissions"), BudgetLimiter(guarded.url, BUDGETS):
            pytest.fail("the limiter started")
    guarded.kill()


async def test_a_reservation_on_a_read_only_server_raises_store_unavailable(start_server: Callable):
    replica = start_server(None, "--replicaof", "127.0.0.1", "1")
    async with AsyncBudgetLimiter(replica.url, BUDGETS, timeout=0.2) as limiter:
        with away(replica.url), pytest.raises(StoreUnavailable):
            await limiter.reserve("agent", "0.15")
    replica.kill()


async def test_an_unexpected_exception_while_a_batch_is_sent_fails_only_the_calls_of_the_batch(server, monkeypatch):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        apply, failures = limiter.engine.store.apply, []

        async def fail_once(*arguments):
            if not failures:
                failures.append(arguments)
                raise ZeroDivisionError("a bug")
            return await apply(*arguments)

        monkeypatch.setattr(limiter.engine.store, "apply", fail_once)
        tries = [asyncio.create_task(limiter.reserve("agent", "0.01")) for _ in range(300)]
        async with asyncio.timeout(30):
            outcomes = await asyncio.gather(*tries, return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert 0 < len(failed) < 300
        assert {type(error) for error in failed} == {BudgetError}


async def test_an_unexpected_exception_during_a_read_is_raised_as_a_budget_error(server, monkeypatch):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        run = limiter.engine.store.run

        async def fail(command, deadline):
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(limiter.engine.store, "run", fail)
        async with asyncio.timeout(30):
            with pytest.raises(BudgetError, match="ZeroDivisionError: a bug"):
                await limiter.status("agent")
        monkeypatch.setattr(limiter.engine.store, "run", run)
        assert (await limiter.status("agent")).spent == 0


@pytest.mark.parametrize("user", ["", "agent"])
async def test_an_error_about_a_wrong_password_does_not_show_the_password(start_server, free_tcp_port, user, caplog):
    secured = start_server(None, "--port", str(free_tcp_port))
    with secured.client() as client:
        client.acl_setuser("agent", enabled=True, passwords=["+right"], keys=["*"], categories=["+@all"])
        client.config_set("requirepass", "right")
    secret = "s3cret-and-wrong"
    limiter = AsyncBudgetLimiter(f"redis://{user}:{secret}@127.0.0.1:{free_tcp_port}/0", BUDGETS)
    shown = [repr(limiter), limiter.store_url, repr(limiter.engine.store)]
    for call in (limiter.start, lambda: limiter.reserve("agent", "0.15"), lambda: limiter.status("agent")):
        with pytest.raises(StoreError) as refused:
            await call()
        shown += [str(refused.value), repr(refused.value), "".join(traceback.format_exception(refused.value))]
    await limiter.close()
    assert "***" in limiter.store_url
    assert secret not in "".join(shown) + caplog.text
    secured.kill()


@pytest.fixture
def free_tcp_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def test_deferred_spend_that_was_never_sent_has_no_maximum_age(own_server):
    """A settlement has a maximum age only if the store may already have executed an earlier attempt."""
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.1, on_store_error="allow") as limiter:
        await limiter.record("agent", "0.01")
        own_server.kill()
        await open_breaker(limiter, lambda: limiter.record("agent", "0.02"))  # which may have been sent
        await limiter.record("agent", "0.03", id="unsent")
        await limiter.engine.dispatcher.replayer.drain()  # the connection is refused
        [entry] = limiter.engine.outbox.of("unsent")
        assert entry.maybe_executed_us is None


async def test_calls_by_id_raise_a_store_error_if_the_key_of_the_hold_has_a_wrong_type(server, client):
    async with AsyncBudgetLimiter(server.url, BUDGETS) as limiter:
        client.lpush(limiter.keys.hold("op_1"), "x")
        for call in (limiter.get("op_1"), limiter.commit("op_1", "0.01"), limiter.extend("op_1")):
            with pytest.raises(StoreError, match="WRONGTYPE"):
                await call
