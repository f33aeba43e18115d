"""The language models that an agent may ask, and which of them the environment chooses."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ktrdr_budget.agent.llm import LLM
from ktrdr_budget.agent.scripted import SCRIPTED_PRICE, ScriptedLLM
from ktrdr_budget.environment import AGENT
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import Prices

__all__ = ["make_llm"]


def make_llm(limiter: AsyncBudgetLimiter, environment: Mapping[str, str] = os.environ) -> LLM:
    """The language model of ``AGENT_LLM``; the scripted one if that is not set.

    Raises:
        InvalidArgument: it cannot be had; the message says what is missing.
    """
    return ScriptedLLM(Meter(limiter, [AGENT], Prices([SCRIPTED_PRICE])))
