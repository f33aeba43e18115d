"""Price lookup: configured prices first, then the public price list, then a fixed cost.

A model without a price is refused, because a call of unknown cost cannot be kept below a cap.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from ktrdr_budget.environment import check_names
from ktrdr_budget.errors import InvalidAmount, InvalidArgument, UnknownPrice
from ktrdr_budget.metering.price_list import PriceList
from ktrdr_budget.metering.rates import UNITS, Cost, CostLine, Rate, Rates
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import AmountIn, to_units

__all__ = ["Cost", "CostLine", "ModelPrice", "Pricer", "Prices", "load_prices"]

FIXED = "fixed"
"""The value of :attr:`Cost.source` if the cost is the fixed cost."""
_NOTHING: Mapping[str, int] = {}


class Pricer(Protocol):
    """Interface of price sources: the cost of a usage, and the worst case of a call."""

    def price(self, provider: str, model: str, usage: Usage, at: datetime) -> Cost:
        """The cost of a usage.

        Args:
            at: the time of the call's reservation, as an aware datetime.

        Raises:
            UnknownPrice: the model has no price.
        """
        ...

    def worst_case(
        self,
        provider: str,
        model: str,
        input_tokens_max: int,
        output_tokens_max: int,
        at: datetime,
        *,
        service_tier: str | None = None,
        other_max: Mapping[str, int] = _NOTHING,
    ) -> Cost:
        """The highest amount that a provider may bill for a call within these bounds.

        Args:
            service_tier: the tier that the request names; ``None`` if the provider chooses.
            other_max: upper bounds of billed units other than tokens, such as ``{"web_searches": 5}``.

        Raises:
            UnknownPrice: the model has no price.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """A configured price, in dollars per million tokens and dollars per request.

    Args:
        model: the model's name, or a prefix followed by ``*``.
        cached_input: the price of input read from a cache; by default the price of input.
        cache_write: the price of input written to a cache; by default the price of input.

    Raises:
        InvalidArgument: a field is invalid.
    """

    provider: str
    model: str
    input: AmountIn
    output: AmountIn
    cached_input: AmountIn | None = None
    cache_write: AmountIn | None = None
    request: AmountIn = 0
    rates: Rates = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("provider", "model"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InvalidArgument(f"a price needs a non-empty {name}")
        prices = (self.input, self.cached_input, self.cache_write, self.output, self.request or None)
        rates = [
            Rate(unit, exact_price(price, f"price of {self.provider}/{self.model}"))
            for unit, price in zip(UNITS, prices, strict=True)
            if price is not None
        ]
        object.__setattr__(self, "rates", Rates(rates, "configured"))


class Prices:
    """The default :class:`Pricer`.

    Args:
        overrides: configured prices. An exact model name takes precedence over a prefix, and a longer prefix over a
            shorter one. If a name occurs twice, its last price applies.
        fixed_cost: dollars per call of a model without a price. If ``None``, calls of such models are refused.

    Raises:
        InvalidArgument: a price is invalid.
    """

    def __init__(self, overrides: Iterable[ModelPrice] = (), fixed_cost: AmountIn | None = None) -> None:
        self._exact: dict[tuple[str, str], Rates] = {}
        self._prefixes: dict[tuple[str, str], Rates] = {}
        for price in overrides:
            table = self._prefixes if price.model.endswith("*") else self._exact
            table[price.provider.lower(), price.model.removesuffix("*").lower()] = price.rates
        self._fixed: Cost | None = None
        if fixed_cost is not None:
            line = CostLine("request", 1, exact_price(fixed_cost, "fixed cost"), 1)
            self._fixed = Cost(to_units(fixed_cost, positive=True), FIXED, (line,))
        self._list: PriceList | None = None

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, overrides: Iterable[ModelPrice] = ()
    ) -> Prices:
        """Read ``KTRDR_PRICES_FILE`` (a TOML file) and ``KTRDR_FIXED_CALL_COST`` (dollars).

        ``overrides`` take precedence over the prices in the file.

        Raises:
            InvalidArgument: a value is invalid, or the file cannot be read.
        """
        check_names(environment)
        path = environment.get("KTRDR_PRICES_FILE", "").strip()
        fixed = environment.get("KTRDR_FIXED_CALL_COST", "").strip() or None
        try:
            loaded = load_prices(path) if path else []
        except InvalidArgument as error:
            raise InvalidArgument(f"KTRDR_PRICES_FILE: {error}") from None
        try:
            return cls([*loaded, *overrides], fixed)
        except InvalidAmount as error:
            raise InvalidAmount(f"KTRDR_FIXED_CALL_COST: {error}") from None

    @property
    def price_list(self) -> PriceList:
        """The public price list, loaded at first use.

        Raises:
            ModuleNotFoundError: the extra ``llm`` is not installed.
        """
        if self._list is None:
            self._list = PriceList()
        return self._list

    @property
    def fixed_cost(self) -> Cost | None:
        """The fixed cost of each call of a model without a price; ``None`` if it is not configured."""
        return self._fixed

    def rates(self, provider: str, model: str, at: datetime, service_tier: str = "") -> Rates | None:
        """The prices of a model at a time; ``None`` if the model has no price."""
        configured = self._configured(provider, model)
        if configured is not None:
            return configured
        return self.price_list.rates(provider, model, _aware(at), service_tier)

    def provider_of(self, model: str) -> str | None:
        """The likely provider of a model, inferred from the model's name: for display, not for billing."""
        name = model.lower()
        exact = [(len(name), provider) for provider, known in self._exact if known == name]
        matches = exact or [(len(prefix), provider) for provider, prefix in self._prefixes if name.startswith(prefix)]
        if matches:
            longest, _ = max(matches)
            return min(provider for length, provider in matches if length == longest)
        found = self.price_list.find(None, model)
        return None if found is None else found[0]

    def price(self, provider: str, model: str, usage: Usage, at: datetime) -> Cost:
        """See :meth:`Pricer.price`."""
        rates = self.rates(provider, model, at, usage.service_tier)
        return self._or_fixed(None if rates is None else rates.cost(usage), provider, model)

    def worst_case(
        self,
        provider: str,
        model: str,
        input_tokens_max: int,
        output_tokens_max: int,
        at: datetime,
        *,
        service_tier: str | None = None,
        other_max: Mapping[str, int] = _NOTHING,
    ) -> Cost:
        """See :meth:`Pricer.worst_case`.

        The most expensive tier that may bill the call is assumed. All input is priced at the highest input rate of that
        tier, which may be the rate of cache writes.
        """
        configured = self._configured(provider, model)
        candidates = (
            (configured,)
            if configured is not None
            else self.price_list.candidates(provider, model, _aware(at), service_tier)
        )
        costs = [rates.cost_max(input_tokens_max, output_tokens_max, other_max) for rates in candidates]
        known = [cost for cost in costs if cost is not None]
        dearest = max(known, key=lambda cost: cost.nanos) if known and len(known) == len(costs) else None
        return self._or_fixed(dearest, provider, model)

    def _configured(self, provider: str, model: str) -> Rates | None:
        provider, model = provider.lower(), model.lower()
        exact = self._exact.get((provider, model))
        if exact is not None or not self._prefixes:
            return exact
        matches = [key for key in self._prefixes if key[0] == provider and model.startswith(key[1])]
        return self._prefixes[max(matches, key=lambda key: len(key[1]))] if matches else None

    def _or_fixed(self, cost: Cost | None, provider: str, model: str) -> Cost:
        if cost is not None:
            return cost
        if self._fixed is not None:
            return self._fixed
        raise UnknownPrice(
            f"no price for {provider}/{model}: add it to KTRDR_PRICES_FILE, or set KTRDR_FIXED_CALL_COST"
        )


def load_prices(path: str | os.PathLike[str]) -> list[ModelPrice]:
    """Read the ``[[prices]]`` tables of a TOML file.

    The keys of a table are ``provider, model, input, output, cached_input, cache_write, request``.

    Raises:
        InvalidArgument: the file cannot be read, or contains an invalid price.
    """
    import tomllib

    try:
        with Path(path).open("rb") as file:
            document = tomllib.load(file, parse_float=Decimal)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"cannot read prices from {os.fspath(path)!r}: {_reason(error)}") from None
    tables = document.pop("prices", [])
    if document or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InvalidArgument(f"{os.fspath(path)!r} must contain [[prices]] tables and nothing else")
    return [_model_price(table, number) for number, table in enumerate(tables, 1)]


def _model_price(table: dict[str, Any], number: int) -> ModelPrice:
    try:
        return ModelPrice(**table)
    except TypeError:
        names = "provider, model, input, output, and optionally cached_input, cache_write, request"
        raise InvalidArgument(f"[[prices]] {number} must have {names}; it has {', '.join(table)}") from None
    except InvalidArgument as error:
        raise InvalidArgument(f"[[prices]] {number}: {error}") from None


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def exact_price(price: AmountIn, name: str) -> Decimal:
    """Convert a price in dollars exactly. A price, unlike an amount, may contain a fraction of a nano-dollar.

    Args:
        name: the name of the price, for the error.

    Raises:
        InvalidAmount: the price is not a finite, non-negative number.
    """
    try:
        to_units(price)  # only to validate the number
    except InvalidAmount as error:
        raise InvalidAmount(f"{name}: {error}") from None
    return Decimal(repr(price)) if isinstance(price, float) else Decimal(price)


def _aware(at: datetime) -> datetime:
    if at.tzinfo is None:
        raise InvalidArgument("`at` must be an aware datetime")
    return at
