"""A chat in the terminal that cannot spend more than a quarter of a dollar a day: ``python -m examples.chat_loop``.

The cap holds for all terminals together that use the same store (``KTRDR_REDIS_URL``, or the embedded server of this
directory). ``CHAT_LIMIT`` and ``CHAT_MODEL`` change it and the model.
"""

from __future__ import annotations

import os

from anthropic import Anthropic
from anthropic.types import MessageParam

from ktrdr_budget import Budget, BudgetExceeded, BudgetLimiter, guard

MODEL = os.environ.get("CHAT_MODEL", "claude-haiku-4-5")


def main() -> None:
    """Asks, answers, and says what it cost, until an empty line or the end of the budget."""
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
                print(f"That does not fit any more: {denied.denial.summary}.")
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
