"""``Auditor.repair``: damaged counters and indexes are rebuilt under concurrent writes; nothing else changes (P11)."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from ktrdr_budget import Budget, BudgetExceeded, BudgetLimiter, StoreUnavailable, UnknownHold
from ktrdr_budget.audit import Auditor, Change, IndexChange, verify
from ktrdr_budget.engine.replica.state import ReplicaState

from ..helpers.keyspace import dump, immortal_keys, today, window_key
from ..helpers.patience import away
from ..helpers.processes import workers
from ..helpers.waiting import wait_until

BUDGETS = [
    Budget("agent", "1000"),
    Budget("tokens", 10**6, unit="tokens", period="ever"),
    Budget("jobs", 50, kind="slots"),
]
LATE = "ktrdr:{default}:h:late"
DUE, UNCONFIRMED = "ktrdr:{default}:due", "ktrdr:{default}:unconfirmed"


@pytest.fixture
def auditor(server) -> Iterator[Auditor]:
    with Auditor(server.url) as made:
        yield made


@pytest.fixture
def limiter(server) -> Iterator[BudgetLimiter]:
    with BudgetLimiter(server.url, BUDGETS, timeout=20) as made:
        yield made


def fill(limiter: BudgetLimiter) -> None:
    """$0.22 spent, $0.15 held, $0.03 unconfirmed; 100 tokens and a slot held."""
    limiter.reserve({"agent": "0.15", "tokens": 100, "jobs": 1}, id="open")
    limiter.reserve("agent", "0.15").commit("0.20")
    limiter.record("agent", "0.02")
    lapse(limiter, "0.03")


def lapse(limiter: BudgetLimiter, amount: str) -> None:
    """Reserve a hold whose deadline has already passed, so that the test need not wait for it."""
    with redis.Redis.from_url(limiter.store_address, decode_responses=True) as client:
        limiter.reserve("agent", amount, id="late")
        words = client.get(LATE).split(" ")
        client.set(LATE, " ".join([*words[:2], "1000", *words[3:]]), keepttl=True)
        client.zadd(DUE, {"late": 1000})
    assert limiter.status("agent").unconfirmed


def window(client: redis.Redis, budget: str = "agent") -> str:
    return window_key(client, budget, "ever" if budget != "agent" else None)


def ledger(client: redis.Redis) -> str:
    return window(client).replace(":w:", ":l:")


def figures(limiter: BudgetLimiter) -> tuple[str, ...]:
    status = limiter.status("agent")
    return tuple(map(str, (status.spent, status.held, status.unconfirmed, status.events)))


# -- counters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        {"spent": 7},
        {"spent": -220_000_000},
        {"held": -1},
        {"unconfirmed": 1_000_000_000},
        {"events": 5},
        {"spent": 5, "unconfirmed": -5},
        {"spent": 1, "held": -2, "unconfirmed": 3, "events": -4},
    ],
    ids=str,
)
def test_a_damaged_counter_is_restored_and_reported(server, client, auditor, limiter, damage):
    fill(limiter)
    assert auditor.repair().changes == []
    right = figures(limiter)
    before = {name: int(client.hget(window(client), name)) for name in damage}
    for name, by in damage.items():
        client.hincrby(window(client), name, by)
    if set(damage) != {"events"}:
        assert [report.budget for report in verify(server.url) if not report.adds_up] == ["agent"]
    repair = auditor.repair()
    day = today(client)
    assert sorted(repair.changes, key=str) == sorted(
        (Change("agent", day, "usd", name, before[name] + by, before[name]) for name, by in damage.items()), key=str
    )
    assert repair.index_changes == []
    assert figures(limiter) == right
    assert all(report.adds_up and report.conclusive for report in repair.windows)
    assert all(report.adds_up for report in verify(server.url))


def test_a_repair_of_correct_windows_changes_nothing(client, auditor, limiter):
    fill(limiter)
    before = dump(client)
    repair = auditor.repair()
    assert (repair.changes, repair.index_changes, len(repair.windows)) == ([], [], 3)
    assert dump(client) == before


def test_a_check_without_repair_never_writes(server, client, limiter):
    fill(limiter)
    client.hincrby(window(client), "spent", 5)
    client.zadd(DUE, {"ghost": 1})
    before = dump(client)
    verify(server.url)
    assert dump(client) == before


def test_a_repair_is_logged_and_adds_a_ledger_entry_with_amount_zero(client, auditor, limiter, caplog):
    fill(limiter)
    client.hincrby(window(client), "spent", 5)
    with caplog.at_level(logging.WARNING, "ktrdr_budget"):
        auditor.repair()
    (record,) = caplog.records
    assert record.getMessage() == f"repaired window {window(client)}: spent from 220000005 to 220000000"
    entry = limiter.ledger("agent")[0]
    assert (entry.kind, entry.amount, entry.operation) == ("audit", 0, "spent -5")


def test_only_the_given_budgets_are_repaired(client, auditor, limiter):
    fill(limiter)
    client.hincrby(window(client), "spent", 5)
    client.hincrby(window(client, "tokens"), "held", 5)
    assert [change.budget for change in auditor.repair([Budget("tokens", 1, unit="tokens")]).changes] == ["tokens"]
    assert [change.budget for change in auditor.repair().changes] == ["agent"]


# -- damaged ledgers and windows ---------------------------------------------------------------------------------------


def test_the_counters_keep_their_values_if_a_ledger_has_lost_entries(server, client, auditor, limiter):
    """The counter and the sum of the replicas' subtotals agree, so the ledger is the damaged part."""
    fill(limiter)
    right = figures(limiter)
    client.lpop(ledger(client))
    assert not all(report.adds_up for report in verify(server.url))
    assert [(change.counter, change.before, change.after) for change in auditor.repair().changes] == [
        ("ledger", 50_000_000, 250_000_000)
    ]
    assert figures(limiter) == right
    assert limiter.ledger("agent")[1].kind == "carried"
    assert all(report.adds_up for report in verify(server.url))
    client.delete(ledger(client))
    auditor.repair()
    assert figures(limiter) == right
    assert immortal_keys(client) == []
    assert all(report.adds_up for report in verify(server.url))


def test_a_missing_window_is_rebuilt_from_its_ledger(server, client, auditor, limiter):
    fill(limiter)
    right = figures(limiter)
    client.delete(window(client))
    assert not all(report.adds_up for report in verify(server.url))
    auditor.repair()
    assert immortal_keys(client) == []
    assert figures(limiter) == right
    limiter.reserve("agent", "0.01").release()
    assert client.hget(window(client), "def") == "usd,day,UTC,spend"
    assert all(report.adds_up for report in verify(server.url))


def test_the_holds_of_a_missing_window_can_be_settled_after_the_repair(server, client, auditor):
    with BudgetLimiter(server.url, BUDGETS) as limiter:
        holds = [limiter.reserve("agent", "0.10") for _ in range(3)]
        limiter.record("agent", "0.02")
        client.delete(window(client))
        for call in (lambda: holds[0].commit("0.10"), holds[1].release, lambda: limiter.commit(holds[2].id)):
            with away(server.url), pytest.raises(StoreUnavailable, match="its key is missing"):
                call()
        assert client.hgetall(window(client)) == {}
        auditor.repair()
        holds[0].commit("0.10")
        holds[1].release()
        limiter.commit(holds[2].id, "0.05")
        assert figures(limiter)[:3] == ("0.17", "0.00", "0.00")
        assert all(report.adds_up for report in verify(server.url))


def test_a_missing_window_does_not_block_other_budgets(server, client):
    with BudgetLimiter(server.url, BUDGETS, timeout=4) as limiter:
        limiter.reserve("agent", "0.10", ttl=1)
        limiter.reserve("tokens", 10**6 - 5)
        client.delete(window(client))

        def stuck() -> str:
            with pytest.raises(StoreUnavailable) as refused:
                limiter.record("agent", "0.01")
            return str(refused.value)

        with away(server.url), ThreadPoolExecutor(8) as threads:
            waiting = [threads.submit(stuck) for _ in range(8)]
            while not all(call.done() for call in waiting):
                limiter.reserve("tokens", 1).release()
                with pytest.raises(BudgetExceeded):
                    limiter.reserve("tokens", 6)
            assert all("its key is missing" in call.result() for call in waiting)
        assert limiter.store_state == "closed"


def test_a_window_whose_ledger_was_trimmed_is_repaired_from_the_subtotals_of_the_replicas(
    server, client, auditor, monkeypatch
):
    monkeypatch.setattr(
        ReplicaState.__init__, "__kwdefaults__", {**ReplicaState.__init__.__kwdefaults__, "ledger_entries_max": 100}
    )
    with BudgetLimiter(server.url, BUDGETS, timeout=20) as limiter:
        lapse(limiter, "0.03")
        while not any(b" carried " in entry for entry in raw_entries(server, client)):
            for _ in range(256):
                limiter.record("agent", "0.01")
        limiter.record("agent", "0.01")
        right = figures(limiter)
        for damage in ({"spent": 5}, {"unconfirmed": -7}, {"spent": 5, "unconfirmed": 8}):
            for name, by in damage.items():
                client.hincrby(window(client), name, by)
            assert {change.counter for change in auditor.repair().changes} == set(damage)
            assert figures(limiter) == right


def raw_entries(server, client: redis.Redis) -> list:
    with redis.Redis(unix_socket_path=str(server.socket_path)) as raw:
        return raw.lrange(ledger(client), 0, 2)


def test_a_repair_leaves_the_overrun_counter_unchanged(client, auditor, limiter):
    fill(limiter)
    client.hincrby(window(client), "overruns", 5)
    assert auditor.repair().changes == []


# -- holds and their indexes -------------------------------------------------------------------------------------------


def test_a_repair_adds_an_open_hold_that_the_index_lacks_and_its_money_stays_held(server, client, auditor, limiter):
    fill(limiter)
    right = figures(limiter)
    before = client.zrange(DUE, 0, -1, withscores=True)
    client.zrem(DUE, "open")
    assert not all(report.adds_up for report in verify(server.url))
    repair = auditor.repair()
    assert repair.index_changes == [IndexChange("due", "open", added=True)]
    assert repair.changes == []
    assert client.zrange(DUE, 0, -1, withscores=True) == before
    assert figures(limiter) == right


def test_a_wrong_deadline_in_the_index_is_corrected_from_the_record_of_the_hold(client, auditor, limiter):
    fill(limiter)
    before = client.zrange(DUE, 0, -1, withscores=True)
    client.zadd(DUE, {"open": 9e12})
    assert auditor.repair().index_changes == [IndexChange("due", "open", added=True)]
    assert client.zrange(DUE, 0, -1, withscores=True) == before


def test_a_repair_adds_an_unconfirmed_hold_that_the_index_lacks(client, auditor, limiter):
    fill(limiter)
    before = client.zscore(UNCONFIRMED, "late")
    client.zrem(UNCONFIRMED, "late")
    assert [hold.id for hold in limiter.holds("agent")] == ["open"]
    assert auditor.repair().index_changes == [IndexChange("unconfirmed", "late", added=True)]
    assert [hold.id for hold in limiter.holds("agent")] == ["open", "late"]
    assert abs(client.zscore(UNCONFIRMED, "late") - before) < 1000


def test_a_repair_removes_index_entries_without_a_matching_hold(server, client, auditor, limiter):
    fill(limiter)
    settled = limiter.reserve("agent", "0.01", id="settled")
    settled.commit()
    client.zadd(DUE, {"ghost": 9e12, "settled": 9e12})
    client.zadd(UNCONFIRMED, {"phantom": 9e12, "open": 9e12})
    repair = auditor.repair()
    assert {(change.index, change.hold_id, change.added) for change in repair.index_changes} == {
        ("due", "ghost", False),
        ("due", "settled", False),
        ("unconfirmed", "phantom", False),
        ("unconfirmed", "open", False),
    }
    assert repair.changes == []
    assert auditor.repair().index_changes == []


def test_a_repair_subtracts_the_amount_of_a_hold_from_the_held_amount_if_the_hold_has_lost_its_record(
    server, client, auditor, limiter
):
    """The worker can no longer commit the hold, so it records its spend instead."""
    fill(limiter)
    hold = limiter.reserve("agent", "0.40", id="gone")
    client.delete("ktrdr:{default}:h:gone")
    repair = auditor.repair()
    assert repair.index_changes == [IndexChange("due", "gone", added=False)]
    assert [(change.counter, change.before, change.after) for change in repair.changes] == [
        ("held", 550_000_000, 150_000_000)
    ]
    with pytest.raises(UnknownHold):
        hold.commit("0.10")
    limiter.record("agent", "0.10")
    assert figures(limiter)[0] == "0.32"
    assert all(report.adds_up for report in verify(server.url))


def test_a_repair_corrects_indexes_with_thousands_of_entries(server, client, auditor):
    with BudgetLimiter(server.url, BUDGETS, timeout=20) as limiter:
        for number in range(30):
            limiter.reserve("tokens", 1, id=f"hold/{number}")
        record = client.get("ktrdr:{default}:h:hold/1")
        pipeline = client.pipeline(transaction=False)
        for number in range(2500):
            pipeline.set(f"ktrdr:{{default}}:h:copy/{number}", record, ex=1000)
            pipeline.zadd(DUE, {f"ghost/{number}": 9e12})
        pipeline.execute()
        repair = auditor.repair()
        assert sum(change.added for change in repair.index_changes) == 2500
        assert sum(not change.added for change in repair.index_changes) == 2500
        assert limiter.status("tokens").held == 2530


# -- under concurrent writes -------------------------------------------------------------------------------------------


def test_damaged_counters_are_restored_to_the_true_values_while_four_processes_spend(server, client):
    dice = random.Random(5)
    with workers("bookkeeper.py", 4, {"url": server.url, "callers": 12}) as keepers, Auditor(server.url) as auditor:
        for keeper in keepers:
            keeper.send(go=True)
        wait_until(lambda: client.llen(ledger(client)) > 500)
        wait_until(lambda: client.zcard(UNCONFIRMED))
        damaged = changed = 0
        for _ in range(6):
            for name in dice.sample(("spent", "held", "unconfirmed", "events"), 2):
                client.hincrby(window(client, dice.choice(("agent", "tokens"))), name, dice.choice((-1, 1)) * 10**6)
                damaged += 1
            repair = auditor.repair()
            changed += len(repair.changes)
            assert all(report.adds_up for report in repair.windows)
            assert repair.index_changes == []
        assert changed >= damaged - 2, "two damages of one counter may cancel out"
        for keeper in keepers:
            keeper.send(stop=True)
        reports = [keeper.receive() for keeper in keepers]
        assert auditor.repair().changes == [], "every damage was repaired, none of them twice"
        assert int(client.hget(window(client), "spent")) == sum(report["spent"] for report in reports)
        assert all(report.adds_up and report.conclusive for report in verify(server.url))
        assert sum(report["calls"] for report in reports) > 1000


def test_concurrent_repairs_correct_each_damaged_counter_once(server, client, limiter):
    fill(limiter)
    right = figures(limiter)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            client.hincrby(window(client), "spent", 12345)
            auditors = [Auditor(server.url) for _ in range(8)]
            repairs = list(threads.map(Auditor.repair, auditors))
            assert sum(len(repair.changes) for repair in repairs) == 1
            assert figures(limiter) == right
            for auditor in auditors:
                auditor.close()
