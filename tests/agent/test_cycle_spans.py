"""The spans of a cycle: the outcome that they show, and the text that no span may contain."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry.trace import StatusCode

from ktrdr_budget import AsyncBudgetLimiter
from ktrdr_budget.agent.llm import Completion
from ktrdr_budget.agent.phases import Assessment, Design
from ktrdr_budget.agent.prompts import UnusableAnswer
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice, Prices
from ktrdr_budget.metering.usage import Usage

from ..helpers.recorded_spans import Recorded
from ..helpers.waiting import until

SECRETS = ("my secret prompt", "my secret answer", "sk-secret-key-1")


class Verbose:
    """A metered model whose errors quote the prompt and a key."""

    provider, model = "acme", "road"

    def __init__(self, limiter: AsyncBudgetLimiter) -> None:
        self.meter = Meter(limiter, ["agent"], Prices([ModelPrice("acme", "road", "10", "50")]))
        self.fails = self.waits = False
        self.output_tokens_max = 200

    async def complete(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        options = {"input_tokens_max": 300, "output_tokens_max": self.output_tokens_max}
        async with self.meter.call(provider="acme", model="road", **options) as call:
            call.report(Usage(100, 7))
            if self.waits:
                await asyncio.Event().wait()
            if self.fails:
                raise RuntimeError(f"400: {prompt} sk-secret-key-1")
            call.finish(Usage(100, 20))
        return Completion("my secret answer", Usage(100, 20), "road")

    async def close(self) -> None:
        pass


@pytest.fixture
async def made(make_stage):
    """A stage whose language model is a :class:`Verbose`, and this model."""
    models: list[Verbose] = []

    def make_llm(limiter: AsyncBudgetLimiter) -> Verbose:
        models.append(Verbose(limiter))
        return models[0]

    stage = await make_stage(limit="0.20", make_llm=make_llm)

    async def design(context) -> Design:
        answer = await context.ask("my secret prompt")
        stage.script.entered["designing"] += 1
        return await stage.script.designed(answer.text)

    async def designed(text: str) -> Design:
        return Design("momentum")

    stage.script.design, stage.script.designed = design, designed
    return stage, models[0]


async def run(stage):
    cycle = await stage.ended((await stage.agent.trigger()).operation_id)
    await until(lambda: not stage.agent.running)
    return cycle


def status_of(recorded: Recorded, name: str) -> tuple[str, object]:
    found = recorded[name]
    return found.status.status_code.name, found.attributes.get("outcome")


def all_text(recorded: Recorded) -> str:
    return "".join(found.to_json() for found in recorded.spans)


async def test_the_span_of_the_assessment_phase_shows_the_verdict_but_not_the_summary(recorded, made):
    stage, _ = made

    async def assess(*_) -> Assessment:
        return Assessment("promising", "my secret answer")

    stage.script.assess = assess
    cycle = await run(stage)
    assert cycle.progress["results"]["summary"] == "my secret answer"
    assert recorded["agent.phase.assessment"].attributes["verdict"] == "promising"
    assert not any(secret in all_text(recorded) for secret in SECRETS)
    phases = ("design", "training", "backtest", "assessment")
    assert {status_of(recorded, f"agent.phase.{name}") for name in phases} == {("UNSET", "completed")}


async def test_the_spans_show_the_error_type_and_stack_trace_of_a_failed_model_call_but_no_message(recorded, made):
    stage, model = made
    model.fails = True
    cycle = await run(stage)
    assert "my secret prompt" in cycle.progress["error"], "the operator can read it in the record"
    for name in ("agent.research_cycle", "agent.phase.design"):
        assert status_of(recorded, name) == ("ERROR", "failed")
        assert recorded[name].attributes["error"] == recorded[name].status.description == "RuntimeError"
    (event,) = recorded["agent.phase.design"].events
    assert (event.attributes["exception.type"], event.attributes["exception.message"]) == ("RuntimeError", "")
    assert "in complete" in event.attributes["exception.stacktrace"]
    assert not any(secret in all_text(recorded) for secret in SECRETS)
    assert recorded["agent.phase.design"].attributes["tokens"] == 107, "tokens of the failed call included"


async def test_the_spans_show_an_error_message_after_a_model_reply_only_if_this_package_raised_the_error(
    recorded, made
):
    stage, _ = made

    async def designed(text: str) -> Design:
        raise ValueError(f"cannot use {text}")

    stage.script.designed = designed
    await run(stage)
    assert recorded["agent.research_cycle"].attributes["error"] == "ValueError"

    async def unusable(text: str) -> Design:
        try:
            raise ValueError(f"cannot use {text}")
        except ValueError:
            raise UnusableAnswer("parameters must be an object") from None

    stage.script.designed = unusable
    await run(stage)
    last = [found for found in recorded.spans if found.name == "agent.phase.design"][-1]
    assert last.attributes["error"] == "UnusableAnswer: parameters must be an object"
    assert last.events[0].attributes["exception.message"] == "parameters must be an object"
    assert not any(secret in all_text(recorded) for secret in SECRETS)


async def test_no_span_shows_the_text_of_an_error_caused_by_a_provider_sdk(recorded, made):
    stage, _ = made
    error = type("APIStatusError", (Exception,), {"__module__": "anthropic"})

    async def train(*_):
        try:
            raise error("my secret prompt")
        except error as cause:
            raise RuntimeError(f"training: {cause}") from cause

    stage.script.train = train
    await run(stage)
    assert recorded["agent.phase.training"].attributes["error"] == "RuntimeError"
    assert not any(secret in all_text(recorded) for secret in SECRETS)


async def test_the_spans_show_the_full_error_message_of_a_phase_without_model_calls(recorded, stage):
    stage.script.fail_in = "training"
    await run(stage)
    for name in ("agent.research_cycle", "agent.phase.training"):
        assert status_of(recorded, name) == ("ERROR", "failed")
        assert recorded[name].attributes["error"] == "RuntimeError: training went wrong with redis://***@host"
    (event,) = recorded["agent.phase.training"].events
    assert "training went wrong" in event.attributes["exception.stacktrace"]


async def test_the_spans_of_a_cancelled_cycle_have_the_outcome_cancelled_and_no_error(recorded, made):
    stage, model = made
    model.waits = True
    started = await stage.agent.trigger()
    (cycle,) = stage.agent.running
    await until(lambda: cycle.hold.accrued["agent"])
    await stage.agent.cancel(started.operation_id)
    await until(lambda: not stage.agent.running)
    for name in ("agent.research_cycle", "agent.phase.design", "chat road"):
        assert status_of(recorded, name) == ("UNSET", "cancelled")
        assert not recorded[name].events
        assert "error" not in recorded[name].attributes
    assert recorded["agent.phase.design"].attributes["tokens"] == 107


async def test_the_spans_show_the_reason_but_no_error_if_the_budget_denies_a_model_call(recorded, made):
    stage, model = made
    model.output_tokens_max = 10_000
    cycle = await run(stage)
    assert (cycle.outcome, cycle.reason) == ("failed", "budget_exhausted")
    for name in ("agent.phase.design", "chat road"):
        assert status_of(recorded, name) == ("UNSET", "denied")
        assert recorded[name].attributes["reason"] == "exceeds_limit"
    assert status_of(recorded, "agent.research_cycle") == ("UNSET", "failed")
    assert recorded["agent.research_cycle"].attributes["reason"] == "budget_exhausted"
    assert {found.status.status_code for found in recorded.spans} == {StatusCode.UNSET}
