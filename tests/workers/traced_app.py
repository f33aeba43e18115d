"""Run a small traced app on a real store, send requests to the app in this process, and print the replies as JSON.

Arguments: the store's URL, then ``METHOD path`` for each request, in order. A request that starts with ``&`` is sent
concurrently with the previous request.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.telemetry.metrics import LimiterMetrics
from ktrdr_budget.telemetry.outcomes import combined
from ktrdr_budget.telemetry.tracing import (
    configure_tracing,
    current_link,
    current_trace_id,
    flush_tracing,
    instrument,
    operation_scope,
    span,
    suppressed,
    trace_call,
)


def make_app(url: str) -> FastAPI:
    metrics = LimiterMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.limiter = AsyncBudgetLimiter(
            url,
            [Budget("agent", limit="5.00")],
            observer=combined(metrics.observe, trace_call),
            trace_id=current_trace_id,
        )
        metrics.watch(app.state.limiter)
        async with app.state.limiter:
            app.state.tasks = set()
            yield
            await asyncio.gather(*app.state.tasks)
            await asyncio.to_thread(flush_tracing)

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    async def cycle(limiter: AsyncBudgetLimiter, link: Any, name: str) -> None:
        with operation_scope(name, "agent_research"), span("agent.research_cycle", links=[link], root=True) as root:
            async with limiter.hold("agent", "0.15") as hold:
                with span("agent.phase.design", {"phase": "designing"}) as current:
                    hold.accrue("0.03")
                    await hold.extend()
                    current.set_attributes({"tokens": 120, "strategy_name": None})
                await asyncio.gather(*(limiter.status("agent") for _ in range(3)))
            root.set_attribute("outcome", "completed")

    async def respond(request: Request) -> Any:
        limiter: AsyncBudgetLimiter = request.app.state.limiter
        match request.url.path.split("/")[1:]:
            case ["spend", amount]:
                await limiter.record("agent", amount, id=f"spend-{amount}")
            case ["cycle", name]:
                task = asyncio.create_task(cycle(limiter, current_link(), name))
                request.app.state.tasks.add(task)
                await task
            case ["quiet"]:
                with suppressed(), span("unseen") as unseen:
                    await limiter.statuses()
                    return {"trace_id": unseen.trace_id + current_trace_id()}
            case ["fails"]:
                with span("failing"):
                    raise ValueError("redis://:geheim@store:6379 is away")
            case _:  # probes and polls also read the store
                await limiter.check()
                await limiter.statuses()
        return {"trace_id": current_trace_id()}

    app.add_api_route("/{path:path}", respond, methods=["GET", "POST"])
    return app


async def main(url: str, words: list[str]) -> None:
    traced = configure_tracing()
    app = make_app(url)
    instrument(app)
    replies: list[Any] = [traced]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service:8000") as client,
    ):
        groups: list[list[str]] = []
        for word in words:
            groups[-1].append(word[1:]) if word.startswith("&") else groups.append([word])
        for group in groups:
            done = await asyncio.gather(*(client.request(*word.split()) for word in group))
            replies += [response.json() if response.status_code == 200 else response.status_code for response in done]
    print(json.dumps(replies))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
