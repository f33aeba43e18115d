"""The language models of an agent, and their selection by the environment.

Calls use the SDKs of the providers. A guard around the SDK reserves the maximum cost of each call; inside a hold, the
hold covers that cost. Replies are streamed. If a call is cancelled, an estimate for the part of the reply that arrived
is charged.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ktrdr_budget.agent.llm import LLM, Completion, UnusableModel
from ktrdr_budget.agent.scripted import SCRIPTED_PRICES, ScriptedLLM
from ktrdr_budget.environment import AGENT
from ktrdr_budget.errors import InvalidArgument, UnknownPrice
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.metering.guards import guard
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import Prices
from ktrdr_budget.metering.usage import Usage

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic
    from openai import AsyncOpenAI

__all__ = ["ANTHROPIC_MODEL", "OPENAI_MODEL", "AnthropicLLM", "OpenAILLM", "make_llm"]

ANTHROPIC_MODEL = "claude-haiku-5-5"
OPENAI_MODEL = "gpt-6-luna"
ANTHROPIC_MODELS = {"opus": "claude-opus-5-5", "sonnet": "claude-sonnet-5-5", "haiku": ANTHROPIC_MODEL}
"""Short names of Anthropic's models, with the full names."""
REASONING_TOKENS_MAX = 3072
"""Output tokens that are added to the limit of each reply, because models count their reasoning as output."""


class AnthropicLLM:
    """Claude, through the Messages API.

    Args:
        client: a guarded client.
        prices: prices of the models.
        model: a full model name, or a short name in :data:`ANTHROPIC_MODELS`.
        reasoning_tokens: output tokens for reasoning, in addition to the tokens of the reply.

    Raises:
        UnusableModel: the model has no price.
    """

    provider = "anthropic"

    def __init__(
        self,
        client: AsyncAnthropic,
        prices: Prices,
        model: str = ANTHROPIC_MODEL,
        *,
        reasoning_tokens: int = REASONING_TOKENS_MAX,
    ) -> None:
        self.model = _priced(self.provider, ANTHROPIC_MODELS.get(model.lower(), model), prices)
        self._client = client
        self._prices = prices
        self._reasoning_tokens = reasoning_tokens

    def using(self, model: str) -> AnthropicLLM:
        """See :meth:`~ktrdr_budget.agent.llm.LLM.using`."""
        return AnthropicLLM(self._client, self._prices, model, reasoning_tokens=self._reasoning_tokens)

    async def complete(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        """See :meth:`~ktrdr_budget.agent.llm.LLM.complete`. Errors of the SDK are not translated."""
        further: dict[str, Any] = {"system": system} if system else {}
        async with self._client.messages.stream(
            model=self.model,
            max_tokens=max_tokens + self._reasoning_tokens,
            messages=[{"role": "user", "content": prompt}],
            **further,
        ) as stream:
            message = await stream.get_final_message()
        read = message.usage.cache_read_input_tokens or 0
        written = message.usage.cache_creation_input_tokens or 0
        usage = Usage(
            input_tokens=message.usage.input_tokens + read + written,
            output_tokens=message.usage.output_tokens,
            cache_read_tokens=read,
            cache_write_tokens=written,
        )
        text = "".join(block.text for block in message.content if block.type == "text")
        return Completion(text, usage, message.model)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


class OpenAILLM:
    """GPT, or another model with OpenAI's Chat Completions API.

    Args:
        client: a guarded client.
        prices: prices of the models.
        reasoning_tokens: output tokens for reasoning, in addition to the tokens of the reply.

    Raises:
        UnusableModel: the model has no price.
    """

    provider = "openai"

    def __init__(
        self,
        client: AsyncOpenAI,
        prices: Prices,
        model: str = OPENAI_MODEL,
        *,
        reasoning_tokens: int = REASONING_TOKENS_MAX,
    ) -> None:
        self.model = _priced(self.provider, model, prices)
        self._client = client
        self._prices = prices
        self._reasoning_tokens = reasoning_tokens

    def using(self, model: str) -> OpenAILLM:
        """See :meth:`~ktrdr_budget.agent.llm.LLM.using`."""
        return OpenAILLM(self._client, self._prices, model, reasoning_tokens=self._reasoning_tokens)

    async def complete(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        """See :meth:`~ktrdr_budget.agent.llm.LLM.complete`. Errors of the SDK are not translated."""
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        stream = await self._client.chat.completions.create(
            model=self.model,
            max_completion_tokens=max_tokens + self._reasoning_tokens,
            messages=[*messages, {"role": "user", "content": prompt}],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, model, usage = "", self.model, Usage()
        async with stream:
            async for chunk in stream:
                model = chunk.model or model
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                if chunk.usage is not None:
                    details = chunk.usage.prompt_tokens_details
                    usage = Usage(
                        input_tokens=chunk.usage.prompt_tokens,
                        output_tokens=chunk.usage.completion_tokens,
                        cache_read_tokens=(details and details.cached_tokens) or 0,
                    )
        return Completion(text, usage, model)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


# -- selection ---------------------------------------------------------------------------------------------------------


def make_llm(limiter: AsyncBudgetLimiter, environment: Mapping[str, str] = os.environ) -> LLM:
    """Create the language model that the environment selects. Its calls are charged to the budget ``agent``.

    ``AGENT_LLM`` is the provider (``scripted``, ``anthropic`` or ``openai``), and ``AGENT_MODEL`` the model. API keys
    are in ``ANTHROPIC_API_KEY`` and ``OPENAI_API_KEY``. ``ANTHROPIC_BASE_URL`` and ``OPENAI_BASE_URL``, if set, replace
    the providers' own endpoints.

    Raises:
        InvalidArgument: the model is unavailable. The message names the cause.
    """
    kind = _text(environment, "AGENT_LLM").lower() or ScriptedLLM.provider
    model = _text(environment, "AGENT_MODEL")
    prices = Prices.from_environment(environment, SCRIPTED_PRICES)
    try:
        if kind == ScriptedLLM.provider:
            scripted = ScriptedLLM(Meter(limiter, [AGENT], prices))
            return scripted.using(model) if model else scripted
        if kind == AnthropicLLM.provider:
            anthropic = _guarded(_client(kind, "AsyncAnthropic", environment), limiter, prices)
            return AnthropicLLM(anthropic, prices, model or ANTHROPIC_MODEL)
        if kind == OpenAILLM.provider:
            openai = _guarded(_client(kind, "AsyncOpenAI", environment), limiter, prices)
            return OpenAILLM(openai, prices, model or OPENAI_MODEL)
    except UnusableModel as error:
        raise InvalidArgument(f"AGENT_MODEL: {error}") from None
    raise InvalidArgument(f"AGENT_LLM: must be 'scripted', 'anthropic' or 'openai', not {kind!r}")


def _guarded(client: Any, limiter: AsyncBudgetLimiter, prices: Prices) -> Any:
    return guard(client, limiter, budgets=[AGENT], pricer=prices)


def _client(kind: str, name: str, environment: Mapping[str, str]) -> Any:
    try:
        make: Callable[..., Any] = getattr(import_module(kind), name)
    except ModuleNotFoundError as error:
        message = f"AGENT_LLM={kind} needs more packages: pip install 'ktrdr-budget[{kind}]' (there is no {error.name})"
        raise InvalidArgument(message) from None
    key = _text(environment, f"{kind.upper()}_API_KEY")
    if not key:
        raise InvalidArgument(f"AGENT_LLM={kind} needs a key in {kind.upper()}_API_KEY")
    further: dict[str, Any] = {}
    if "open_telemetry" in inspect.signature(make).parameters:
        further["open_telemetry"] = False  # the guard writes the span of a call, with its cost
    return make(api_key=key, base_url=_text(environment, f"{kind.upper()}_BASE_URL") or None, **further)


def _priced(kind: str, model: str, prices: Prices) -> str:
    """Return the model, or raise if the model has no price, because each cycle would fail at its first call."""
    try:
        prices.worst_case(kind, model, 1, 1, datetime.now(UTC))
    except UnknownPrice as error:
        raise UnusableModel(str(error)) from None
    except ModuleNotFoundError as error:
        raise InvalidArgument(f"AGENT_LLM={kind}: {error}") from None
    return model


def _text(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name, "").strip()
