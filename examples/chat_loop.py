"""A chat in the terminal with a cap of a quarter of a dollar per day: ``python -m examples.chat_loop``.

All terminals with the same store (``KTRDR_REDIS_URL``, or the embedded server of this directory) share the cap.
``CHAT_LIMIT`` sets the cap, ``CHAT_MODEL`` the model.
"""

from __future__ import annotations

import os

from anthropic import Anthropic
from anthropic.types import MessageParam

from ktrdr_budget import Budget, BudgetExceeded, BudgetLimiter, guard

MODEL = os.environ.get("CHAT_MODEL", "claude-haiku-4-5")


def main() -> None:
    """Answer questions and print the spend, until an empty line or the end of the budget."""
    budget = Budget("chat", limit=os.environ.get("CHAT_LIMIT", "0.25"))
    with BudgetLimiter(os.environ.get("KTRDR_REDIS_URL"), [budget]) as limiter:
        client = guard(Anthropic(), limiter, budgets=["chat"])
        messages: list[MessageParam] = []
        while question := _ask():
            messages.append({"role": "user", "content": question})
            try:
                with client.messages.stream(model=MODEL, max_tokens=1024, messages=messages) as stream:
                    for text in stream.text_stream:
                        print(text, end="", flush=True)
                    answer = stream.get_final_text()
            except BudgetExceeded as denied:
                print(f"The question does not fit the budget: {denied.denial.summary}.")
                break
            messages.append({"role": "assistant", "content": answer})
            status = limiter.status("chat")
            print(f"\n[${status.spent} spent today, ${status.remaining} left]")


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
