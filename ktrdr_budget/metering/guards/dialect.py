"""The interface of a dialect: which requests to a provider are metered, their bounds, and how usage is reported."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from ktrdr_budget.metering.guards.bounds import Bound, GuardOptions
from ktrdr_budget.metering.guards.usage_parser import UsageParser

__all__ = ["Dialect", "Route"]

Route = Literal["free", "refused"] | str
"""``free``: costs nothing, is sent. ``refused``: may cost money, has no meter. Otherwise: a metered endpoint's name."""


class Dialect(Protocol):
    """The API of one provider."""

    def route(self, method: str, path: str) -> Route:
        """Classify a request by its method and path."""
        ...

    def model(self, path: str, body: dict[str, Any]) -> str:
        """The model whose price applies."""
        ...

    def bound(self, route: Route, model: str, body: dict[str, Any], size: int, options: GuardOptions) -> Bound:
        """The upper bound of a request's usage.

        Args:
            size: bytes of the request's text.

        Raises:
            UnmeteredCall: the request has no bound.
        """
        ...

    def usage_parser(self, route: Route, bound: Bound) -> UsageParser:
        """Return a parser for the usage in the response."""
        ...
