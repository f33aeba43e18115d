"""Prices of one call: the worst case that is reserved, and the cost of the usage that the provider reports."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ktrdr_budget.metering.prices import Pricer
from ktrdr_budget.metering.rates import Cost
from ktrdr_budget.metering.usage import Usage

__all__ = ["CallPricing"]

logger = logging.getLogger("ktrdr_budget")


class CallPricing:
    """Prices one call whose usage has fixed upper bounds.

    Every price is the one in force at the time of the call's reservation.

    Args:
        at: the time of the reservation, as an aware datetime.
        service_tier: the tier that the request names; ``None`` if the provider chooses.
        other_max: upper bounds of billed units other than tokens.

    Raises:
        UnknownPrice: the model has no price.
    """

    def __init__(
        self,
        pricer: Pricer,
        provider: str,
        model: str,
        at: datetime,
        *,
        input_tokens_max: int,
        output_tokens_max: int,
        service_tier: str | None,
        other_max: Mapping[str, int],
    ) -> None:
        self._pricer = pricer
        self._provider = provider
        self._model = model
        self._at = at
        self._input_tokens_max = input_tokens_max
        self._service_tier = service_tier
        self.worst_case = self._worst_case(output_tokens_max, service_tier, other_max)
        """The highest cost within the bounds."""

    def cost(self, usage: Usage) -> Cost | None:
        """Return the cost of a usage. If the pricer fails, log the error and return ``None``."""
        try:
            return self._pricer.price(self._provider, self._model, usage, self._at)
        except Exception as error:
            self._log_failure(error)
            return None

    def with_input_bound(self, usage: Usage) -> tuple[Usage, Cost]:
        """Replace a missing input count by its upper bound; return the completed usage and its cost.

        Use this method if a call breaks off before the provider has reported the input: the provider bills the input
        all the same. The input is priced at the most expensive rate, because it may have been written to a cache. If
        neither the usage nor the request names a service tier, the most expensive tier is priced.
        """
        other = {name: count for name, count in usage.other.items() if not name.startswith("input_")}
        bounded = Usage(self._input_tokens_max, usage.output_tokens, service_tier=usage.service_tier, other=other)
        try:
            return bounded, self._worst_case(usage.output_tokens, usage.service_tier or self._service_tier, other)
        except Exception as error:
            self._log_failure(error)
            return bounded, self.worst_case

    def _worst_case(self, output_tokens_max: int, service_tier: str | None, other_max: Mapping[str, int]) -> Cost:
        # Omitted arguments keep custom pricers simple that support neither tiers nor other units.
        options: dict[str, Any] = {}
        if service_tier is not None:
            options["service_tier"] = service_tier
        if other_max:
            options["other_max"] = other_max
        return self._pricer.worst_case(
            self._provider, self._model, self._input_tokens_max, output_tokens_max, self._at, **options
        )

    def _log_failure(self, error: Exception) -> None:
        logger.error("pricing failed for %s/%s, charging the worst case: %s", self._provider, self._model, error)
