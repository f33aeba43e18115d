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
    """A metered language model. Each call reserves its maximum cost. Inside a hold, the hold covers that cost."""

    provider: str
    model: str

    async def complete(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        """Send a prompt and return the complete reply.

        Raises:
            BudgetExceeded: the budget cannot cover the maximum cost of the call. No request was sent.
        """
        ...

    def using(self, model: str) -> LLM:
        """Return an object for another model of the same provider. Both objects share their connections.

        Args:
            model: a full model name, or a short name such as ``haiku``.

        Raises:
            UnusableModel: the provider has no such model, or the model has no price.
        """
        ...

    async def close(self) -> None:
        """Close the connections. The caller must not use the model afterwards."""
        ...
