"""The interface between the agent and a language model."""

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
    """The text of a reply, with its token usage and model."""

    text: str
    usage: Usage
    model: str


class LLM(Protocol):
    """A metered language model: each call reserves its maximum cost, or claims it from the enclosing hold."""

    provider: str
    model: str

    async def complete(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        """Send a prompt and return the complete reply.

        Raises:
            BudgetExceeded: the budget cannot cover the worst case; nothing was sent.
        """
        ...

    def using(self, model: str) -> LLM:
        """Return the same provider with another model, by full or short name (``haiku``); connections are shared.

        Raises:
            UnusableModel: the provider has no such model, or the model has no price.
        """
        ...

    async def close(self) -> None:
        """Close the connections; the model must not be used afterwards."""
        ...
