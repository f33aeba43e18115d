"""Settings of the agent: each variable has a default, a least and a largest value."""

from __future__ import annotations

import pytest

from ktrdr_budget.agent.settings import AgentSettings
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.models import TTL_MAX_S

FIELDS = {
    "AGENT_MAX_CONCURRENT_CYCLES": "max_concurrent_cycles",
    "AGENT_CYCLE_TTL": "cycle_ttl",
    "AGENT_PHASE_SECONDS": "phase_seconds",
}


def test_the_defaults_are_used_for_unset_and_empty_variables():
    assert AgentSettings.from_environment({}) == AgentSettings()
    assert AgentSettings.from_environment(dict.fromkeys(FIELDS, " ")) == AgentSettings()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("AGENT_MAX_CONCURRENT_CYCLES", " 3 ", 3),
        ("AGENT_MAX_CONCURRENT_CYCLES", "10000", 10_000),
        ("AGENT_CYCLE_TTL", "1", 1.0),
        ("AGENT_CYCLE_TTL", str(TTL_MAX_S), TTL_MAX_S),
        ("AGENT_PHASE_SECONDS", "0", 0.0),
        ("AGENT_PHASE_SECONDS", "0.25", 0.25),
    ],
)
def test_each_environment_variable_sets_the_matching_field(name, text, value):
    assert getattr(AgentSettings.from_environment({name: text}), FIELDS[name]) == value


@pytest.mark.parametrize(
    ("name", "text", "range_"),
    [
        ("AGENT_MAX_CONCURRENT_CYCLES", "0", "a whole number from 1 to 10000"),
        ("AGENT_MAX_CONCURRENT_CYCLES", "10001", "a whole number from 1 to 10000"),
        ("AGENT_MAX_CONCURRENT_CYCLES", "1.5", "a whole number from 1 to 10000"),
        ("AGENT_CYCLE_TTL", "0.9", "a number from 1 to"),
        ("AGENT_CYCLE_TTL", str(TTL_MAX_S + 1), "a number from 1 to"),
        ("AGENT_PHASE_SECONDS", "-1", "a number from 0 to 3600"),
        ("AGENT_PHASE_SECONDS", "nan", "a number from 0 to 3600"),
        ("AGENT_PHASE_SECONDS", "long", "a number from 0 to 3600"),
    ],
)
def test_the_error_for_an_invalid_variable_shows_the_name_and_the_allowed_range(name, text, range_):
    with pytest.raises(InvalidArgument, match=f"^{name}: must be {range_}.*, not '{text}'$"):
        AgentSettings.from_environment({name: text})


def test_the_thresholds_of_the_gates_are_read_from_environment_variables():
    thresholds = AgentSettings.from_environment({"TRAINING_GATE_MIN_ACCURACY": "0.25"}).thresholds
    assert thresholds != AgentSettings().thresholds
