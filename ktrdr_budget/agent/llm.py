"""What the agent asks of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ktrdr_budget.metering.usage import Usage

__all__ = ["LLM", "Completion"]


@dataclass(frozen=True)
class Completion:
    """An answer, and what it took."""

    text: str
    usage: Usage
    model: str


class LLM(Protocol):
    """A language model whose calls are metered: each reserves its worst case, or draws it from the hold around it."""

    provider: str
    model: str

    async def complete(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        """Asks, and waits for the whole answer.

        Raises:
            BudgetExceeded: there is no room for the worst case; nothing was sent.
        """
        ...

    async def close(self) -> None:
        """Lets go of its connections; it is not asked any more."""
        ...
