"""An agent with tools, inside one hold: ``python -m examples.agent_with_tools "How did BTC do?"``.

The agent holds $0.15 once, and its calls claim from this hold. If a call does not fit, the hold grows; if it cannot
grow, the agent stops before it sends anything. At the end the ledger has one entry with the total cost.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from anthropic import AsyncAnthropic
from anthropic.types import MessageParam, ToolParam, ToolResultBlockParam

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, guard

MODEL = os.environ.get("AGENT_MODEL", "claude-haiku-4-5")
STEPS_MAX = 8
TOOLS: list[ToolParam] = [
    {
        "name": "closing_prices",
        "description": "The closing prices of a symbol on its last five days, in dollars.",
        "input_schema": {"type": "object", "properties": {"symbol": {"type": "string"}}, "required": ["symbol"]},
    }
]


def closing_prices(symbol: str) -> list[float]:
    """A tool with made-up prices."""
    return [100.0 + len(symbol) + day for day in range(5)]


async def answer(client: AsyncAnthropic, question: str) -> str:
    """Let the model call tools until it has an answer."""
    messages: list[MessageParam] = [{"role": "user", "content": question}]
    for _ in range(STEPS_MAX):
        reply = await client.messages.create(model=MODEL, max_tokens=1024, messages=messages, tools=TOOLS)
        messages.append({"role": "assistant", "content": reply.content})
        results = [_use(block) for block in reply.content if block.type == "tool_use"]
        if not results:
            return "".join(block.text for block in reply.content if block.type == "text")
        messages.append({"role": "user", "content": results})
    return "No answer found."


def _use(call: Any) -> ToolResultBlockParam:
    print(f"uses {call.name}({', '.join(map(str, call.input.values()))})")
    return {"type": "tool_result", "tool_use_id": call.id, "content": str(closing_prices(**call.input))}


async def main(question: str) -> int:
    """Answer one question; return 1 if the budget denies it."""
    budget = Budget("agent", limit=os.environ.get("AGENT_DAILY_BUDGET", "5.00"))
    async with AsyncBudgetLimiter(os.environ.get("KTRDR_REDIS_URL"), [budget]) as limiter:
        client = guard(AsyncAnthropic(), limiter, budgets=["agent"])
        try:
            async with limiter.hold("agent", "0.15", operation="agent_with_tools") as hold:
                print(await answer(client, question))
        except BudgetExceeded as denied:
            print(f"No budget: {denied}")
            return 1
        print(f"held ${hold.amounts['agent']}, cost ${hold.accrued['agent']}")
        return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(" ".join(sys.argv[1:]) or "How did BTC do this week?")))
