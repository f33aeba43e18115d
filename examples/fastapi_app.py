"""A web service with a budget for its model calls: ``uvicorn examples.fastapi_app:app``.

Each request to ``POST /ask`` holds two cents, and its calls claim from this hold. If they do not fit, the response is
429 with ``Retry-After``, as ``application/problem+json``. Any number of workers and machines may share the cap.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from openai import AsyncOpenAI
from pydantic import BaseModel

from ktrdr_budget import AsyncBudgetLimiter, Budget, guard
from ktrdr_budget.api import hold_budget

MODEL = os.environ.get("AGENT_MODEL", "gpt-4.1-mini")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One limiter and one guarded client for all requests of this process."""
    budget = Budget("agent", limit=os.environ.get("AGENT_DAILY_BUDGET", "5.00"))
    async with AsyncBudgetLimiter(os.environ.get("KTRDR_REDIS_URL"), [budget]) as limiter, AsyncOpenAI() as client:
        app.state.limiter = limiter
        app.state.client = guard(client, limiter, budgets=["agent"], max_output_tokens=500)
        yield


app = FastAPI(title="A guarded service", lifespan=lifespan)
two_cents = hold_budget("agent", estimate="0.02", limiter=lambda request: request.app.state.limiter)


class Question(BaseModel):
    """A question for the model."""

    text: str


@app.post("/ask", dependencies=[Depends(two_cents)])
async def ask(question: Question, request: Request) -> dict[str, str]:
    """Ask the model; the cost is committed after the response has been sent."""
    response = await request.app.state.client.responses.create(model=MODEL, input=question.text)
    return {"answer": response.output_text}


@app.get("/budget")
async def budget(request: Request) -> dict[str, Any]:
    """The figures of today's window."""
    status = await request.app.state.limiter.status("agent")
    return {"limit": str(status.limit), "spent": str(status.spent), "remaining": str(status.remaining)}
