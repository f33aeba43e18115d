"""The time that a guard adds to a call of a language model: guarded and unguarded calls to a local provider."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from statistics import median
from typing import Any

import httpx

from benchmarks.measures import Measure, Settings, at_most
from benchmarks.servers import free_port, running
from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.engine.replica.hold import current_hold
from ktrdr_budget.metering.guards import guard

__all__ = ["guard_overhead"]

_START_TIMEOUT_S = 20.0
_MESSAGES: Any = [{"role": "user", "content": "What is a budget? " * 20}]

Call = Callable[[Any], Awaitable[Any]]


async def _message(client: Any) -> None:
    await client.messages.create(model="claude-haiku-4-5", max_tokens=100, messages=_MESSAGES)


async def _message_stream(client: Any) -> None:
    async with client.messages.stream(model="claude-haiku-4-5", max_tokens=100, messages=_MESSAGES) as stream:
        async for _ in stream:
            pass


async def _chat(client: Any) -> None:
    await client.chat.completions.create(model="gpt-4.1-mini", max_completion_tokens=100, messages=_MESSAGES)


async def _chat_stream(client: Any) -> None:
    stream = await client.chat.completions.create(
        model="gpt-4.1-mini", max_completion_tokens=100, messages=_MESSAGES, stream=True
    )
    async for _ in stream:
        pass


_CALLS: dict[str, tuple[str, Call]] = {
    "anthropic, messages.create": ("anthropic", _message),
    "anthropic, messages.stream": ("anthropic", _message_stream),
    "openai, chat.completions.create": ("openai", _chat),
    "openai, chat.completions.create, streamed": ("openai", _chat_stream),
}


@contextmanager
def _provider() -> Iterator[str]:
    """Run the local provider in a process of its own for as long as the block lasts; yield its URL."""
    port = free_port()
    words = [sys.executable, "-m", "examples.local_provider", "--port", str(port), "--token-delay", "0"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    ends = time.monotonic() + _START_TIMEOUT_S
    try:
        while True:
            try:
                httpx.get(f"{url}/ledger", trust_env=False)
                break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > ends:
                    raise RuntimeError("the local provider does not start") from None
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


async def guard_overhead(settings: Settings) -> list[Measure]:
    """Unguarded and guarded calls take turns; a round's figure is the difference of their medians.

    Outside of a hold, a guarded call makes two requests to the store; inside a hold, it makes none. To measure the cost
    of the two requests alone, an unguarded call is also made between an explicit reservation and an explicit commit.
    """
    import anthropic
    import openai

    rounds, calls = settings.rounds(9), settings.size(150, 20)
    with running(settings.store) as server, _provider() as url:
        async with AsyncExitStack() as stack:
            limiter = await stack.enter_async_context(AsyncBudgetLimiter(server.url, [Budget("agent", "5000000")]))
            kinds: dict[str, Callable[[], Any]] = {
                "anthropic": lambda: anthropic.AsyncAnthropic(base_url=url, api_key="local"),
                "openai": lambda: openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="local"),
            }
            plain = {sdk: await stack.enter_async_context(make()) for sdk, make in kinds.items()}
            guarded = {sdk: guard(await stack.enter_async_context(make()), limiter) for sdk, make in kinds.items()}
            return [
                await _measure(name, call, plain[sdk], guarded[sdk], limiter, rounds, calls)
                for name, (sdk, call) in _CALLS.items()
            ]


async def _measure(
    name: str, call: Call, plain: Any, guarded: Any, limiter: AsyncBudgetLimiter, rounds: int, calls: int
) -> Measure:
    async def by_hand(client: Any) -> None:
        hold = await limiter.reserve("agent", "0.0015")
        await call(client)
        await hold.commit("0.0012")

    async def inside(client: Any) -> None:
        outer = current_hold.set(large)
        await call(client)
        current_hold.reset(outer)

    large = await limiter.reserve("agent", "1000")
    turns: list[tuple[Call, Any]] = [(call, plain), (call, guarded), (inside, guarded), (by_hand, plain)]
    medians: list[list[float]] = []
    for number in range(rounds + 1):
        taken_ms: list[list[float]] = [[] for _ in turns]
        for _ in range(calls):
            for (made, client), taken in zip(turns, taken_ms, strict=True):
                begun = time.perf_counter()
                await made(client)
                taken.append((time.perf_counter() - begun) * 1000)
        if number:  # the first round connects
            medians.append([median(taken) for taken in taken_ms])
    await large.release()
    words = "".join(letter if letter.isalnum() else "_" for letter in name.replace(", ", "_"))
    unguarded, inside_ms, by_hand_ms = (
        median(row[turn] - row[0] * (turn > 0) for row in medians) for turn in (0, 2, 3)
    )
    return Measure(
        f"guard_overhead_{words}",
        f"what a guard adds to a call: {name}",
        "ms",
        tuple(row[1] - row[0] for row in medians),
        at_most(0.5),
        detail=f"unguarded {unguarded:.2f} ms; reserve + commit by hand would add {by_hand_ms:.2f} ms; "
        f"a guard inside a hold adds {inside_ms:.2f} ms",
    )
