"""Replicas as separate processes on one real server: shared state, and the effects of a kill."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from decimal import Decimal
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ktrdr_budget.agent.phases import PHASES

from ..api.processes import ServiceProcess, serving
from ..helpers.otlp_receiver import OtlpReceiver, Span
from ..helpers.waiting import wait_until

pytestmark = pytest.mark.slow

V1 = "/api/v1"
Launch = Callable[..., list[ServiceProcess]]


@pytest.fixture
def launch(server):
    """Start replicas on the shared server."""
    with ExitStack() as stack:

        def start(count: int, workers: int = 1, **environment: Any) -> list[ServiceProcess]:
            given = {"KTRDR_REDIS_URL": server.url, "AGENT_CYCLE_TTL": 1, "AGENT_PHASE_SECONDS": 0, **environment}
            return [stack.enter_context(serving(workers=workers, **given)) for _ in range(count)]

        yield start


def trigger(replica: ServiceProcess) -> str:
    answer = replica.post(f"{V1}/agent/trigger")
    assert answer.status_code == 202, answer.text
    return answer.json()["operation_id"]


def status(replica: ServiceProcess) -> dict[str, Any]:
    return replica.get(f"{V1}/agent/status").json()


def cycle(replica: ServiceProcess, operation_id: str) -> dict[str, Any]:
    found = replica.get(f"{V1}/agent/cycles").json()["cycles"]
    return next(each for each in found if each["operation_id"] == operation_id)


def wait_ended(replica: ServiceProcess, operation_id: str) -> dict[str, Any]:
    wait_until(lambda: cycle(replica, operation_id)["ended_at"])
    return cycle(replica, operation_id)


def budget(replica: ServiceProcess) -> dict[str, Any]:
    return replica.get(f"{V1}/agent/budget").json()


def samples(replica: ServiceProcess) -> dict[tuple[str, ...], float]:
    text = replica.get("/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def suspend_in(phase: str, here: ServiceProcess, there: ServiceProcess) -> str:
    """Suspend the replica ``here`` while its cycle is in ``phase``; return the id of the cycle.

    A cycle that is already past the phase is cancelled, and another cycle is triggered.
    """
    reached = PHASES[PHASES.index(phase) :]
    while True:
        operation_id = trigger(here)
        wait_until(lambda name=operation_id: cycle(there, name)["phase"] in reached)
        here.process.send_signal(signal.SIGSTOP)
        if cycle(there, operation_id)["phase"] == phase:
            return operation_id
        here.process.send_signal(signal.SIGCONT)
        there.request("DELETE", f"{V1}/agent/cancel/{operation_id}")
        wait_until(lambda: status(there)["status"] == "idle")


@pytest.mark.parametrize("phase", PHASES)
def test_killing_a_replica_makes_the_estimate_of_the_cycle_unconfirmed_and_frees_the_slot(launch: Launch, phase: str):
    here, there = launch(2, AGENT_PHASE_SECONDS=0.5, AGENT_CYCLE_TTL=2)
    operation_id = suspend_in(phase, here, there)
    spent = budget(there)["today_spend"]
    here.process.kill()
    wait_until(lambda: status(there)["status"] == "idle")
    last = status(there)["last_cycle"]
    assert (last["operation_id"], last["outcome"], last["reason"], last["phase"]) == (
        operation_id, "failed", "worker_lost", phase,
    )  # fmt: skip
    figures = budget(there)
    assert (figures["today_spend"], figures["unconfirmed"], figures["held"]) == (spent, 0.15, 0)
    assert there.get(f"{V1}/budgets/agent:cycles").json()["held"] == 0
    assert samples(there)["agent_cycles_total", "failed"] == 1, "counted by the replica that marked it"
    assert trigger(there) != operation_id


def test_a_new_cycle_can_start_when_the_cycle_of_a_killed_replica_is_marked_as_lost(launch: Launch):
    here, there = launch(2, AGENT_PHASE_SECONDS=3600, AGENT_CYCLE_TTL=3, AGENT_DAILY_BUDGET="5.00")
    lost = trigger(here)
    wait_until(lambda: Decimal(cycle(there, lost)["spend"]) > 0)
    here.process.kill()
    wait_until(lambda: there.post(f"{V1}/agent/trigger").status_code == 202)
    seen = status(there)
    assert [each["operation_id"] for each in seen["active_cycles"]] != [lost]
    assert len(seen["active_cycles"]) == 1
    assert (seen["last_cycle"]["operation_id"], seen["last_cycle"]["reason"]) == (lost, "worker_lost")
    assert samples(there)["agent_cycles_total", "failed"] == 1


def test_a_replica_suspended_beyond_the_ttl_records_the_real_spend_when_resumed(launch: Launch):
    here, there = launch(2, AGENT_PHASE_SECONDS=3600)
    slept = trigger(here)
    wait_until(lambda: Decimal(cycle(there, slept)["spend"]) > 0)
    here.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: status(there)["status"] == "idle")
    assert status(there)["last_cycle"]["reason"] == "worker_lost"
    assert budget(there)["unconfirmed"] == 0.15
    here.process.send_signal(signal.SIGCONT)
    wait_until(lambda: budget(there)["unconfirmed"] == 0)
    ended = cycle(there, slept)
    assert (ended["outcome"], ended["reason"]) == ("failed", "worker_lost")
    wait_until(lambda: float(cycle(there, slept)["spend"]) == budget(there)["today_spend"] > 0)
    assert sum(samples(replica)["agent_cycles_total", "failed"] for replica in (here, there)) == 1


def test_the_last_cycle_in_the_status_is_the_most_recently_ended_cycle(launch: Launch):
    (replica,) = launch(1, AGENT_PHASE_SECONDS=3600, AGENT_MAX_CONCURRENT_CYCLES=2)
    first, second = trigger(replica), trigger(replica)
    for operation_id in (second, first):
        assert replica.request("DELETE", f"{V1}/agent/cancel/{operation_id}").status_code == 200
        assert status(replica)["last_cycle"]["operation_id"] == operation_id
    listed = replica.get(f"{V1}/agent/cycles").json()["cycles"]
    assert [each["operation_id"] for each in listed] == [second, first], "newest first"


def test_fifty_concurrent_triggers_start_only_as_many_cycles_as_the_budget_covers(launch: Launch):
    settings = {"AGENT_DAILY_BUDGET": "0.50", "AGENT_MAX_CONCURRENT_CYCLES": 50}
    # A ttl that no stall exceeds: the late commit of a lost cycle would free budget.
    replicas = launch(2, AGENT_PHASE_SECONDS=3600, AGENT_CYCLE_TTL=60, **settings)
    with ThreadPoolExecutor(25) as pool:
        answers = list(pool.map(lambda i: replicas[i % 2].post(f"{V1}/agent/trigger"), range(50)))
    assert Counter(answer.status_code for answer in answers) == {202: 3, 429: 47}
    assert all(a.json()["reason"] == "budget_exhausted" for a in answers if a.status_code == 429)
    seen = [status(replica) for replica in replicas]
    assert [each["operation_id"] for each in seen[0]["active_cycles"]] == [
        each["operation_id"] for each in seen[1]["active_cycles"]
    ]
    assert len(seen[0]["active_cycles"]) == 3


def test_the_spend_and_the_last_cycle_are_unchanged_after_a_restart(launch: Launch):
    (replica,) = launch(1)
    ended = wait_ended(replica, trigger(replica))
    before = budget(replica)
    assert replica.stop() == 0
    (again,) = launch(1)
    assert budget(again) == before
    assert before["today_spend"] == float(ended["spend"]) > 0
    assert status(again)["last_cycle"] == ended


def test_a_cycle_started_on_one_replica_can_be_cancelled_on_a_second_replica(launch: Launch):
    here, there = launch(2, AGENT_PHASE_SECONDS=3600)
    operation_id = trigger(here)
    wait_until(lambda: Decimal(cycle(there, operation_id)["spend"]) > 0)
    answer = there.request("DELETE", f"{V1}/agent/cancel/{operation_id}")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    spend = Decimal(cycle(here, operation_id)["spend"])
    assert Decimal(str(budget(here)["today_spend"])) == spend > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_the_spend_counters_of_all_replicas_add_up_to_the_total_of_the_ledger(launch: Launch, workers: int):
    replicas = launch(2, workers=workers, AGENT_DAILY_BUDGET="1.00")
    for replica in (*replicas, *replicas):
        wait_ended(replica, trigger(replica))
    replicas[0].post(f"{V1}/spend", {"amounts": {"agent": "0.01"}})
    entries = replicas[0].get(f"{V1}/budgets/agent/ledger").json()["entries"]
    spent = sum(Decimal(entry["amount"]) for entry in entries)
    found = [samples(replica) for replica in replicas]

    def summed(*key: str) -> float:
        return sum(each[key] for each in found)

    assert summed("agent_budget_spend_total") == pytest.approx(float(spent), abs=1e-9)
    assert summed("agent_cycles_total", "completed") == 4
    assert summed("agent_cycles_total", "failed") == summed("agent_cycles_total", "cancelled") == 0
    assert summed("agent_cycle_duration_seconds_count") == 4
    assert summed("agent_phase_duration_seconds_count", "training") == 4
    assert summed("agent_gate_results_total", "backtest", "pass") == 4
    cycles = replicas[0].get(f"{V1}/agent/cycles").json()["cycles"]
    for phase in ("design", "assessment"):
        assert summed("agent_tokens_total", phase) > 0
        assert summed("agent_tokens_total", phase) == sum(each["tokens"][phase] for each in cycles)
    for name, amount in (("spent", spent), ("limit", 1), ("remaining", 1 - spent), ("held", 0), ("unconfirmed", 0)):
        for each in found:
            assert each[f"agent_budget_{name}_dollars",] == float(amount)


# -- traces ------------------------------------------------------------------------------------------------------------

ALL_SPANS = ["agent.phase.design", "agent.phase.training", "agent.phase.backtest", "agent.phase.assessment"]
ENDINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "completed": ({}, ALL_SPANS),
    "failed": ({"TRAINING_GATE_MIN_ACCURACY": "0.99"}, ALL_SPANS[:2]),
    "cancelled": ({"AGENT_PHASE_SECONDS": 3600}, ALL_SPANS[:1]),
}


@pytest.mark.parametrize("outcome", ENDINGS)
def test_all_spans_of_a_cycle_form_a_tree_linked_to_the_span_of_the_trigger_request(launch: Launch, outcome: str):
    environment, phases = ENDINGS[outcome]
    with OtlpReceiver() as receiver:
        here, there = launch(2, **environment, **receiver.environment)
        operation_id = trigger(here)
        if outcome == "cancelled":
            # A call is in progress: the output that has arrived is charged.
            wait_until(lambda: Decimal(cycle(there, operation_id)["spend"]) > 0)
            there.request("DELETE", f"{V1}/agent/cancel/{operation_id}")
        ended = wait_ended(there, operation_id)
        assert ended["outcome"] == outcome
        for replica in (here, there):
            replica.get("/metrics")
            assert replica.stop() == 0
        spans = receiver.wait_named("agent.research_cycle")
    (root,) = [span for span in spans if span.name == "agent.research_cycle"]
    tree = [span for span in spans if span.trace_id == root.trace_id]
    _is_one_tree(root, tree)
    assert root.trace_id == ended["trace_id"]
    assert root.resource["service.name"] == "ktrdr-backend"
    for span in tree:
        assert (span.attributes["operation.id"], span.attributes["operation.type"]) == (operation_id, "agent_research")
    named = {span.name: span for span in tree}
    assert [name for name in ALL_SPANS if name in named] == phases
    assert all(named[name].parent_id == root.span_id for name in phases)
    assert named["agent.phase.design"].attributes["phase"] == "designing"
    assert root.attributes["tokens"] == sum(ended["tokens"].values()) > 0
    assert root.attributes["tokens"] == sum(span.attributes.get("tokens", 0) for span in tree if span is not root)
    assert root.attributes["outcome"] == outcome
    assert any(span.attributes.get("db.system") == "redis" for span in tree)
    assert any(span.attributes.get("gen_ai.request.model") == "ktrdr-scripted-1" for span in tree)
    assert any(span.name == "ktrdr.budget.commit" for span in tree)
    (http,) = [span for span in spans if span.kind == "server" and "trigger" in span.name]
    assert root.links == [(http.trace_id, http.span_id)]
    assert any(s.name == "ktrdr.budget.reserve" and s.parent_id == http.span_id for s in spans)
    roots = [span for span in spans if not span.parent_id]
    assert not any("db.system" in span.attributes for span in roots)
    assert not any(word in span.name for span in roots for word in ("/metrics", "/status", "/livez", "/readyz"))
    if outcome == "failed":
        gate = named["agent.phase.training"]
        assert (gate.attributes["gate.passed"], gate.status, root.status) == (False, "error", "error")
        assert "accuracy" in gate.attributes["gate.reason"]
        assert any(event.name == "exception" for event in gate.events)


def _is_one_tree(root: Span, tree: list[Span]) -> None:
    ids = {span.span_id for span in tree}
    assert root.parent_id == ""
    orphans = [span for span in tree if span is not root and span.parent_id not in ids]
    assert not orphans, orphans


def test_the_ledger_entry_of_a_cycle_has_the_trace_id_of_the_cycle(launch: Launch):
    with OtlpReceiver() as receiver:
        (replica,) = launch(1, **receiver.environment)
        ended = wait_ended(replica, trigger(replica))
        (entry,) = replica.get(f"{V1}/budgets/agent/ledger").json()["entries"]
        assert entry["trace_id"] == ended["trace_id"] != ""
