"""Settings of the agent, from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ktrdr_budget.agent.gates import Thresholds
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.models import TTL_MAX_S

__all__ = ["AgentSettings"]

_SLOTS_MAX = 10_000


@dataclass(frozen=True)
class AgentSettings:
    """Settings of the agent. The environment variable of a field is ``AGENT_`` and the name of the field.

    The thresholds have variables of their own, ``TRAINING_GATE_*`` and ``BACKTEST_GATE_*``.
    """

    max_concurrent_cycles: int = 1
    cycle_ttl: float = 30.0
    """Seconds without a heartbeat after which a cycle and its hold expire."""
    phase_seconds: float = 1.0
    """Minimum duration in seconds of each phase of the bundled research."""
    thresholds: Thresholds = field(default_factory=Thresholds)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> AgentSettings:
        """Read the settings from the environment. If a variable is not set, its field has the default.

        Raises:
            InvalidArgument: a variable is invalid. The message names the variable.
        """
        return cls(
            max_concurrent_cycles=int(
                _number(environment, "AGENT_MAX_CONCURRENT_CYCLES", 1, 1, _SLOTS_MAX, whole=True)
            ),
            cycle_ttl=_number(environment, "AGENT_CYCLE_TTL", 30.0, 1, TTL_MAX_S),
            phase_seconds=_number(environment, "AGENT_PHASE_SECONDS", 1.0, 0, 3600),
            thresholds=Thresholds.from_environment(environment),
        )


def _number(
    environment: Mapping[str, str], name: str, default: float, least: float, most: float, *, whole: bool = False
) -> float:
    text = environment.get(name, "").strip()
    if not text:
        return default
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = -1
    if not least <= number <= most:
        kind = "a whole number" if whole else "a number"
        raise InvalidArgument(f"{name}: must be {kind} from {least:g} to {most:g}, not {text!r}")
    return number
