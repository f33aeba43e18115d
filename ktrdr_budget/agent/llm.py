"""What the agent asks of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.metering.usage import Usage

__all__ = ["LLM", "Completion", "UnusableModel"]


class UnusableModel(InvalidArgument):
    """The provider has no such model, or the model has no price."""


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

    def using(self, model: str) -> LLM:
        """The same provider with another model, by its name or by a short one such as ``haiku``; shares connections.

        Raises:
            UnusableModel: the provider has no such model, or the model has no price.
        """
        ...

    async def close(self) -> None:
        """Lets go of its connections; it is not asked any more."""
        ...
