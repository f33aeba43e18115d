"""Guarded clients of the real SDKs against the local provider; one table of SDK methods for sync and async tests."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

import anthropic
import openai
import redis

from examples.local_provider import Billed, LocalProvider
from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.metering.guards import guard

from .keyspace import ledger_entries, ledger_key, sums

CLAUDE, GPT, EMBEDDING = "claude-haiku-4-5", "gpt-4.1-mini", "text-embedding-3-small"
PRICES = {
    # Dollars per million tokens: input, output, cache read, cache write for 5 minutes, cache write for an hour.
    # From genai-prices 0.2.3; Claude's also at platform.claude.com/docs/en/about-claude/pricing.
    CLAUDE: ("1", "5", "0.1", "1.25", "2"),
    GPT: ("0.4", "1.6", "0.1", "0.4", "0.4"),
    EMBEDDING: ("0.02", "0", "0.02", "0.02", "0.02"),
}
MESSAGES = [{"role": "user", "content": "What is a budget?"}]
MAX_TOKENS = 50
API_KEY = "sk-secret-key-of-the-tests"


def cost_nanos(billed: Billed) -> int:
    """The provider's price of a ledger line, computed here without code of the package."""
    whole, output, read, written, written_1h = map(Decimal, PRICES[billed.model])
    plain = billed.input_tokens - billed.cache_read_tokens - billed.cache_write_tokens
    dollars_per_million = plain * whole + billed.output_tokens * output + billed.cache_read_tokens * read
    dollars_per_million += (billed.cache_write_tokens - billed.cache_write_1h_tokens) * written
    dollars_per_million += billed.cache_write_1h_tokens * written_1h
    return int((dollars_per_million * 1000).to_integral_value(rounding=ROUND_CEILING))


def bill_nanos(ledger: Iterable[Billed]) -> int:
    """The provider's price of a ledger."""
    return sum(map(cost_nanos, ledger))


@dataclass(frozen=True)
class Method:
    """One SDK method that calls a model."""

    name: str
    sdk: str
    call: Callable[..., Any]
    shape: str = "plain"
    """How the response is read.

    ``plain``, ``stream`` (iterated), ``manager`` (entered and iterated) or ``bytes`` (entered and read).
    """

    def __str__(self) -> str:
        return self.name

    @property
    def limit_parameter(self) -> str:
        """The parameter of the output limit."""
        if self.sdk == "anthropic":
            return "max_tokens"
        return "max_completion_tokens" if self.name.startswith("chat") else "max_output_tokens"


def _claude(**more: Any) -> dict[str, Any]:
    return {"model": CLAUDE, "max_tokens": MAX_TOKENS, "messages": MESSAGES, **more}


def _chat(**more: Any) -> dict[str, Any]:
    return {"model": GPT, "max_completion_tokens": MAX_TOKENS, "messages": MESSAGES, **more}


def _response(**more: Any) -> dict[str, Any]:
    return {"model": GPT, "max_output_tokens": MAX_TOKENS, "input": "What is a budget?", **more}


METHODS = [
    Method("messages.create", "anthropic", lambda c, **o: c.messages.create(**_claude(**o))),
    Method(
        "messages.create-stream", "anthropic", lambda c, **o: c.messages.create(**_claude(stream=True, **o)), "stream"
    ),
    Method("messages.stream", "anthropic", lambda c, **o: c.messages.stream(**_claude(**o)), "manager"),
    Method("beta.messages.create", "anthropic", lambda c, **o: c.beta.messages.create(**_claude(**o))),
    Method("beta.messages.stream", "anthropic", lambda c, **o: c.beta.messages.stream(**_claude(**o)), "manager"),
    Method("messages.raw", "anthropic", lambda c, **o: c.messages.with_raw_response.create(**_claude(**o))),
    Method(
        "messages.bytes",
        "anthropic",
        lambda c, **o: c.messages.with_streaming_response.create(**_claude(**o)),
        "bytes",
    ),
    Method("chat.create", "openai", lambda c, **o: c.chat.completions.create(**_chat(**o))),
    Method(
        "chat.create-stream", "openai", lambda c, **o: c.chat.completions.create(**_chat(stream=True, **o)), "stream"
    ),
    Method("chat.stream", "openai", lambda c, **o: c.chat.completions.stream(**_chat(**o)), "manager"),
    Method("chat.parse", "openai", lambda c, **o: c.chat.completions.parse(**_chat(**o))),
    Method("chat.raw", "openai", lambda c, **o: c.chat.completions.with_raw_response.create(**_chat(**o))),
    Method("responses.create", "openai", lambda c, **o: c.responses.create(**_response(**o))),
    Method(
        "responses.create-stream", "openai", lambda c, **o: c.responses.create(**_response(stream=True, **o)), "stream"
    ),
    Method("responses.stream", "openai", lambda c, **o: c.responses.stream(**_response(**o)), "manager"),
    Method("responses.parse", "openai", lambda c, **o: c.responses.parse(**_response(**o))),
    Method(
        "responses.bytes",
        "openai",
        lambda c, **o: c.responses.with_streaming_response.create(**_response(**o)),
        "bytes",
    ),
]
METHOD = {method.name: method for method in METHODS}
"""The methods by name."""
STREAMS = [method for method in METHODS if method.shape in ("stream", "manager")]
PLAIN = [method for method in METHODS if method.shape == "plain"]
BASIC = [method for method in METHODS if method.name in ("messages.create", "chat.create", "responses.create")]
BASIC_STREAMS = [method for method in STREAMS if method.name.endswith(".create-stream")]


class WithArguments:
    """A client that passes additional or different arguments to each method."""

    def __init__(self, inner: Any, more: dict[str, Any]) -> None:
        self._inner, self._more = inner, more

    def __getattr__(self, name: str) -> Any:
        return WithArguments(getattr(self._inner, name), self._more)

    def __call__(self, **named: Any) -> Any:
        return self._inner(**{**named, **self._more})


async def resolve(result: Any) -> Any:
    """The result of a sync or an async call."""
    return await result if inspect.isawaitable(result) else result


async def next_item(stream: Any) -> Any:
    """The next item of a sync or an async stream; raises ``StopAsyncIteration`` at its end."""
    if hasattr(stream, "__anext__"):
        return await anext(stream)
    try:
        return next(stream)
    except StopIteration:
        raise StopAsyncIteration from None


@asynccontextmanager
async def entered(manager: Any) -> AsyncIterator[Any]:
    """Enter a sync or an async context manager."""
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value


async def run(method: Method, client: Any, *, items: int | None = None, **options: Any) -> list[Any]:
    """Call a method, sync or async; return its result as a list: one item, or the items of its stream.

    Args:
        items: close the stream after so many items.
    """
    result = method.call(client, **options)
    if method.shape == "plain":
        return [await resolve(result)]
    if method.shape == "stream":
        result = await resolve(result)
    async with entered(result) as opened:
        if method.shape == "bytes":
            return [await resolve(opened.read())]
        received: list[Any] = []
        while items is None or len(received) < items:
            try:
                received.append(await next_item(opened))
            except StopAsyncIteration:
                break
        return received


def http_client_of(client: Any) -> Any:
    """The HTTP client of an SDK client, which has no public name."""
    return vars(client)["_client"]


@dataclass
class Guarded:
    """A guarded client with its provider, limiter and store."""

    sdk: str
    is_async: bool
    provider: LocalProvider
    limiter: Any
    client: Any
    store: redis.Redis

    @property
    def sums(self) -> dict[str, int]:
        """The figures of the window, in nano-dollars."""
        return sums(self.store)

    @property
    def counted(self) -> int:
        """The amount that counts against the limit, in nano-dollars."""
        figures = self.sums
        return figures["spent"] + figures["held"] + figures["unconfirmed"]

    @property
    def bill(self) -> int:
        """The provider's bill, in nano-dollars."""
        return bill_nanos(self.provider.ledger)

    @property
    def labels(self) -> list[str]:
        """Kind, hold and label of each ledger entry, oldest first."""
        return [" ".join(entry[2:]) for entry in ledger_entries(self.store, ledger_key(self.store))]

    @property
    def http_client(self) -> Any:
        """The HTTP client that the SDK uses."""
        return http_client_of(self.client)

    def hold(self, amount: str) -> Any:
        """``limiter.hold(...)`` as an async context manager, also for a sync limiter."""
        return entered(self.limiter.hold("agent", amount))


def raw_client(sdk: str, is_async: bool, provider: LocalProvider, **options: Any) -> Any:
    """An unguarded client of the local provider."""
    library: Any = anthropic if sdk == "anthropic" else openai
    url = provider.anthropic_url if sdk == "anthropic" else provider.openai_url
    kind = {"anthropic": "Anthropic", "openai": "OpenAI"}[sdk]
    client = getattr(library, f"Async{kind}" if is_async else kind)
    # Loading certificates would take longer than a test.
    http_client = (library.DefaultAsyncHttpxClient if is_async else library.DefaultHttpxClient)(verify=False)
    return client(**{"api_key": API_KEY, "base_url": url, "max_retries": 0, "http_client": http_client, **options})


@asynccontextmanager
async def guarded(
    sdk: str,
    is_async: bool,
    local: LocalProvider,
    server: Any,
    *,
    limit: str = "5.00",
    client_options: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Guarded]:
    """A guarded client with its own limiter on the server of the test."""
    limiter = (AsyncBudgetLimiter if is_async else BudgetLimiter)(server.url, [Budget("agent", limit)])
    client = raw_client(sdk, is_async, local, **(client_options or {}))
    async with AsyncExitStack() as stack:
        store = stack.enter_context(server.client())
        await stack.enter_async_context(entered(limiter))
        await stack.enter_async_context(entered(client))
        yield Guarded(sdk, is_async, local, limiter, guard(client, limiter, **options), store)
