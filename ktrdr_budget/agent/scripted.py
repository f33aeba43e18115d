"""A language model without network or key, for the two prompts of the bundled research.

The same prompt gives the same reply, the same tokens and so the same cost. Output arrives over time, as from a real
model: a cycle can be watched, and a cancelled call is charged for the output that has arrived.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ktrdr_budget.agent import prompts
from ktrdr_budget.agent.llm import Completion, UnusableModel
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import ModelPrice
from ktrdr_budget.metering.usage import Usage

__all__ = ["SCRIPTED_PRICE", "SCRIPTED_PRICES", "ScriptedLLM"]

SCRIPTED_PRICE = ModelPrice("scripted", "ktrdr-scripted-1", input=15, output=75)
"""The prices of the scripted model's tokens. No real money is spent."""
_SIZES = {
    "opus": SCRIPTED_PRICE,
    "sonnet": ModelPrice("scripted", "ktrdr-scripted-1-sonnet", input=9, output=45),
    "haiku": ModelPrice("scripted", "ktrdr-scripted-1-haiku", input=3, output=15),
}
SCRIPTED_PRICES = tuple(_SIZES.values())
"""Prices of three model sizes with identical replies, so that model selection can be tried without a key."""
TOKENS_PER_SECOND_DEFAULT = 500.0
CONTEXT_TOKENS = 500
"""Input tokens that are charged in addition to the prompt, as providers charge tool descriptions."""
REASONING_TOKENS = (120, 240)
"""The minimum and the maximum number of reasoning tokens, which are output before the text of a reply."""
CHARACTERS_PER_TOKEN = 4
CHUNK_TOKENS = 16


class ScriptedLLM:
    """Implements :class:`~ktrdr_budget.agent.llm.LLM` without a network.

    Args:
        meter: reserves and accrues the cost of each call. The meter's pricer must include :data:`SCRIPTED_PRICES`.
        model: the name of a model in :data:`SCRIPTED_PRICES`.
        tokens_per_second: the output rate. With ``math.inf``, there is no delay.

    Raises:
        InvalidArgument: ``tokens_per_second`` is not positive.
    """

    provider = SCRIPTED_PRICE.provider

    def __init__(
        self,
        meter: Meter,
        *,
        model: str = SCRIPTED_PRICE.model,
        tokens_per_second: float = TOKENS_PER_SECOND_DEFAULT,
    ) -> None:
        if not tokens_per_second > 0:
            raise InvalidArgument(f"tokens_per_second must be positive, not {tokens_per_second!r}")
        self.model = model
        self._meter = meter
        self._tokens_per_second = tokens_per_second

    async def complete(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        """See :meth:`~ktrdr_budget.agent.llm.LLM.complete`. A reply longer than ``max_tokens`` is cut off."""
        input_tokens = CONTEXT_TOKENS + tokens_in(system) + tokens_in(prompt)
        text = answer(prompt)
        reasoning_tokens = min(max_tokens, round(_chosen(prompt, "reasoning", *REASONING_TOKENS)))
        text = text[: (max_tokens - reasoning_tokens) * CHARACTERS_PER_TOKEN]
        usage = Usage(input_tokens, reasoning_tokens + tokens_in(text))
        async with self._meter.call(
            provider=self.provider,
            model=self.model,
            input_tokens_max=input_tokens,
            output_tokens_max=max_tokens,
        ) as call:
            for output_tokens in range(0, usage.output_tokens, CHUNK_TOKENS):
                call.report(Usage(input_tokens, output_tokens))
                await asyncio.sleep(CHUNK_TOKENS / self._tokens_per_second)
            call.finish(usage)
        return Completion(text, usage, self.model)

    def using(self, model: str) -> ScriptedLLM:
        """See :meth:`~ktrdr_budget.agent.llm.LLM.using`."""
        named = {price.model: price for price in SCRIPTED_PRICES}
        price = _SIZES.get(model.lower()) or named.get(model)
        if price is None:
            known = ", ".join((*_SIZES, *named))
            raise UnusableModel(f"there is no scripted model {model!r}; choose one of {known}, or set AGENT_LLM")
        return ScriptedLLM(self._meter, model=price.model, tokens_per_second=self._tokens_per_second)

    async def close(self) -> None:
        """Do nothing, because the model has no connections."""


def tokens_in(text: str) -> int:
    """Estimate the number of tokens in a text."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


# -- replies -----------------------------------------------------------------------------------------------------------


def answer(prompt: str) -> str:
    """Return a design or an assessment, as the prompt requests. For any other prompt, return a fixed sentence."""
    if (strategies := prompts.strategies_of(prompt)) is not None:
        return json.dumps(_design(prompt, strategies))
    if (figures := prompts.figures_of(prompt)) is not None:
        return json.dumps(_judgement(figures))
    return "A scripted model knows the prompts of the bundled research only."


def _design(prompt: str, strategies: Mapping[str, Any]) -> dict[str, Any]:
    names = list(strategies)
    name = names[int(_chosen(prompt, "strategy", 0, len(names)))]
    brief = re.sub(r"[^a-z]+", "_", (prompts.brief_of(prompt) or "").lower())
    name = next((asked for asked in names if asked in brief), name)
    parameters = {
        parameter: _value(prompt, parameter, *ends) for parameter, ends in strategies[name]["parameters"].items()
    }
    rationale = (
        f"{name} {strategies[name]['description']}, and spells that last some weeks are what it lives on. "
        f"The windows are long enough to see past a day's noise, and a threshold of {parameters.get('threshold')} "
        "leaves out the days on which the model cannot tell, so that costs do not eat what it earns."
    )
    return {"strategy": name, "parameters": parameters, "rationale": rationale}


def _value(prompt: str, parameter: str, lowest: float, highest: float) -> float:
    if isinstance(lowest, int) and isinstance(highest, int):
        return min(highest, int(_chosen(prompt, parameter, lowest, highest + 1)))
    return round(_chosen(prompt, parameter, lowest, highest), 3)


def _judgement(figures: Mapping[str, Any]) -> dict[str, str]:
    ratio, fall, trades = (float(figures[name]) for name in ("sharpe_ratio", "max_drawdown", "trades"))
    if ratio < 0.3 or fall > 0.3:
        verdict, next_step = "poor", "Try another family of strategies before touching its parameters."
    elif ratio < 1 or trades < 10:
        verdict, next_step = "mediocre", "Try a higher threshold, which trades less, before anything else."
    else:
        verdict, next_step = "promising", "Try it on other instruments before believing it."
    summary = (
        f"A Sharpe ratio of {ratio:.2f} out of sample with a deepest fall of {fall:.1%} is {verdict}. "
        f"It made {trades:.0f} trades, of which {float(figures['win_rate']):.0%} won, and predicted "
        f"{float(figures['accuracy']):.1%} of the days that it had not seen. {next_step}"
    )
    return {"verdict": verdict, "summary": summary}


def _chosen(prompt: str, what: str, lowest: float, highest: float) -> float:
    """Return a number in [``lowest``, ``highest``) that depends on the prompt only."""
    digest = hashlib.sha256(f"{what}\n{prompt}".encode()).digest()
    return lowest + (highest - lowest) * int.from_bytes(digest[:6], "big") / 2**48
