"""Guarded clients of the real SDKs against the local provider, sync and async by one table."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
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
    # Dollars per million tokens: input, output, read from a cache, written to it for 5 minutes, and for an hour.
    # As listed by genai-prices 0.2.3; Claude's also at platform.claude.com/docs/en/about-claude/pricing.
    CLAUDE: ("1", "5", "0.1", "1.25", "2"),
    GPT: ("0.4", "1.6", "0.1", "0.4", "0.4"),
    EMBEDDING: ("0.02", "0", "0.02", "0.02", "0.02"),
}
MESSAGES = [{"role": "user", "content": "What is a budget?"}]
MAX_TOKENS = 50
SECRET = "sk-do-not-tell-anyone"


def cost_nanos(billed: Billed) -> int:
    """What the provider takes for a line of its ledger: computed here, by no code of the package."""
    whole, output, read, written, written_1h = map(Decimal, PRICES[billed.model])
    plain = billed.input_tokens - billed.cache_read_tokens - billed.cache_write_tokens
    dollars_per_million = plain * whole + billed.output_tokens * output + billed.cache_read_tokens * read
    dollars_per_million += (billed.cache_write_tokens - billed.cache_write_1h_tokens) * written
    dollars_per_million += billed.cache_write_1h_tokens * written_1h
    return int((dollars_per_million * 1000).to_integral_value(rounding=ROUND_CEILING))


def bill_nanos(ledger: Iterable[Billed]) -> int:
    """What the provider takes for all of it."""
    return sum(map(cost_nanos, ledger))


@dataclass(frozen=True)
class Way:
    """One way to call a model by an SDK."""

    name: str
    sdk: str
    call: Callable[..., Any]
    shape: str = "plain"
    """``plain``, ``stream`` (iterated), ``manager`` (entered, and iterated) or ``bytes`` (entered, and read)."""

    def __str__(self) -> str:
        return self.name


def _claude(**more: Any) -> dict[str, Any]:
    return {"model": CLAUDE, "max_tokens": MAX_TOKENS, "messages": MESSAGES, **more}


def _chat(**more: Any) -> dict[str, Any]:
    return {"model": GPT, "max_completion_tokens": MAX_TOKENS, "messages": MESSAGES, **more}


def _response(**more: Any) -> dict[str, Any]:
    return {"model": GPT, "max_output_tokens": MAX_TOKENS, "input": "What is a budget?", **more}


WAYS = [
    Way("messages.create", "anthropic", lambda c, **o: c.messages.create(**_claude(**o))),
    Way("messages.create-stream", "anthropic", lambda c, **o: c.messages.create(**_claude(stream=True, **o)), "stream"),
    Way("messages.stream", "anthropic", lambda c, **o: c.messages.stream(**_claude(**o)), "manager"),
    Way("beta.messages.create", "anthropic", lambda c, **o: c.beta.messages.create(**_claude(**o))),
    Way("beta.messages.stream", "anthropic", lambda c, **o: c.beta.messages.stream(**_claude(**o)), "manager"),
    Way("messages.raw", "anthropic", lambda c, **o: c.messages.with_raw_response.create(**_claude(**o))),
    Way(
        "messages.bytes",
        "anthropic",
        lambda c, **o: c.messages.with_streaming_response.create(**_claude(**o)),
        "bytes",
    ),
    Way("chat.create", "openai", lambda c, **o: c.chat.completions.create(**_chat(**o))),
    Way("chat.create-stream", "openai", lambda c, **o: c.chat.completions.create(**_chat(stream=True, **o)), "stream"),
    Way("chat.stream", "openai", lambda c, **o: c.chat.completions.stream(**_chat(**o)), "manager"),
    Way("chat.parse", "openai", lambda c, **o: c.chat.completions.parse(**_chat(**o))),
    Way("chat.raw", "openai", lambda c, **o: c.chat.completions.with_raw_response.create(**_chat(**o))),
    Way("responses.create", "openai", lambda c, **o: c.responses.create(**_response(**o))),
    Way(
        "responses.create-stream", "openai", lambda c, **o: c.responses.create(**_response(stream=True, **o)), "stream"
    ),
    Way("responses.stream", "openai", lambda c, **o: c.responses.stream(**_response(**o)), "manager"),
    Way("responses.parse", "openai", lambda c, **o: c.responses.parse(**_response(**o))),
    Way(
        "responses.bytes",
        "openai",
        lambda c, **o: c.responses.with_streaming_response.create(**_response(**o)),
        "bytes",
    ),
]
STREAMS = [way for way in WAYS if way.shape in ("stream", "manager")]
PLAIN = [way for way in WAYS if way.shape == "plain"]
BASIC = [way for way in WAYS if way.name in ("messages.create", "chat.create", "responses.create")]
BASIC_STREAMS = [way for way in STREAMS if way.name.endswith(".create-stream")]


class Telling:
    """A client whose methods are called with some arguments more, or others."""

    def __init__(self, inner: Any, more: dict[str, Any]) -> None:
        self._inner, self._more = inner, more

    def __getattr__(self, name: str) -> Any:
        return Telling(getattr(self._inner, name), self._more)

    def __call__(self, **named: Any) -> Any:
        return self._inner(**{**named, **self._more})


async def take(way: Way, client: Any, *, items: int | None = None, **options: Any) -> list[Any]:
    """Makes the call and takes all that it gives, or so many items of its stream; sync or async."""
    made = way.call(client, **options)
    if way.shape == "plain":
        return [await made if inspect.isawaitable(made) else made]
    if way.shape == "stream":
        made = await made if inspect.isawaitable(made) else made
    if hasattr(made, "__aenter__"):
        async with made as opened:
            if way.shape == "bytes":
                return [await opened.read()]
            return [item async for item in _first(opened, items)]
    with made as opened:
        return (
            [opened.read()]
            if way.shape == "bytes"
            else [item for _, item in zip(_counter(items), opened, strict=False)]
        )


async def _first(stream: Any, items: int | None) -> AsyncIterator[Any]:
    for _ in _counter(items):
        try:
            yield await anext(stream)
        except StopAsyncIteration:
            return


def _counter(items: int | None) -> Iterable[int]:
    return range(items if items is not None else 10**9)


@dataclass
class Guarded:
    """A guarded client, and what pays for it."""

    sdk: str
    is_async: bool
    provider: LocalProvider
    limiter: Any
    client: Any
    store: redis.Redis

    @property
    def sums(self) -> dict[str, int]:
        """The window's figures, in nano-dollars."""
        return sums(self.store)

    @property
    def counted(self) -> int:
        """What counts against the limit."""
        found = self.sums
        return found["spent"] + found["held"] + found["unconfirmed"]

    @property
    def bill(self) -> int:
        """What the provider takes."""
        return bill_nanos(self.provider.ledger)

    @property
    def labels(self) -> list[str]:
        """Kind, hold and labels of the entries of the ledger, oldest first."""
        return [" ".join(entry[2:]) for entry in ledger_entries(self.store, ledger_key(self.store))]


def raw_client(sdk: str, is_async: bool, provider: LocalProvider, **options: Any) -> Any:
    """An unguarded client of the local provider."""
    library: Any = anthropic if sdk == "anthropic" else openai
    url = provider.anthropic_url if sdk == "anthropic" else provider.openai_url
    kind = {"anthropic": "Anthropic", "openai": "OpenAI"}[sdk]
    client = getattr(library, f"Async{kind}" if is_async else kind)
    # Without certificates, which take longer to load than a test takes.
    http_client = (library.DefaultAsyncHttpxClient if is_async else library.DefaultHttpxClient)(verify=False)
    return client(**{"api_key": SECRET, "base_url": url, "max_retries": 0, "http_client": http_client, **options})


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
    """A guarded client with a limiter of its own on the server of the test."""
    limiter = (AsyncBudgetLimiter if is_async else BudgetLimiter)(server.url, [Budget("agent", limit)])
    client = raw_client(sdk, is_async, local, **(client_options or {}))
    with server.client() as store:
        if is_async:
            async with limiter, client:
                yield Guarded(sdk, is_async, local, limiter, guard(client, limiter, **options), store)
        else:
            with limiter, client:
                yield Guarded(sdk, is_async, local, limiter, guard(client, limiter, **options), store)
