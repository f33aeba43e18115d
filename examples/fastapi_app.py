"""A web service whose routes cannot spend more than their budget: ``uvicorn examples.fastapi_app:app``.

Each request to ``POST /ask`` holds two cents; its calls draw from that. Without room the answer is 429 with
``Retry-After``, as ``application/problem+json``. Any number of workers and machines may share one cap.
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
    """What to ask."""

    text: str


@app.post("/ask", dependencies=[Depends(two_cents)])
async def ask(question: Question, request: Request) -> dict[str, str]:
    """Asks the model; what the call cost is committed once the answer has been sent."""
    response = await request.app.state.client.responses.create(model=MODEL, input=question.text)
    return {"answer": response.output_text}


@app.get("/budget")
async def budget(request: Request) -> dict[str, Any]:
    """What is left today."""
    status = await request.app.state.limiter.status("agent")
    return {"limit": str(status.limit), "spent": str(status.spent), "remaining": str(status.remaining)}
