"""Prices of the package ``genai-prices`` (extra ``llm``), converted to :class:`~.rates.Rates`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from importlib import import_module
from typing import Any, TypeVar

from ktrdr_budget.metering.rates import Rate, Rates, Unit

__all__ = ["PriceList"]

_CACHED_MAX = 10_000

Key = TypeVar("Key")
Value = TypeVar("Value")


class PriceList:
    """The installed price list, or a newer one that the program has loaded with ``genai_prices.UpdatePrices``.

    This class downloads nothing.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            self._package = import_module("genai_prices")
            self._snapshots = import_module("genai_prices.data_snapshot")
            self._definitions = import_module("genai_prices.data_units").unit_data
        except ModuleNotFoundError as error:
            message = f"the price list needs more packages: pip install 'ktrdr-budget[llm]' (missing: {error.name})"
            raise ModuleNotFoundError(message, name=error.name) from None
        self._cached: dict[tuple[str, str, str, int], tuple[Any, Rates | None]] = {}
        self._cached_tiers: dict[tuple[str, str, int], tuple[Any, list[Rates]]] = {}

    @cached_property
    def _units(self) -> dict[str, Unit]:
        return {
            definition["price_key"]: Unit(name, definition["per"], frozenset(definition["dimensions"].items()))
            for name, definition in self._definitions.items()
        }

    @property
    def source(self) -> str:
        """The name and version of the list in use."""
        source = f"genai-prices/{self._package.__version__}"
        snapshot = self._snapshots.get_snapshot()
        return f"{source}+{snapshot.timestamp:%Y-%m-%dT%H:%M}" if snapshot.from_auto_update else source

    def find(self, provider: str | None, model: str) -> tuple[str, str] | None:
        """Return the list's names of a provider and a model; ``None`` if the model is not listed.

        If ``provider`` is ``None``, the provider is inferred from the model's name.
        """
        found = self._find(provider, model)
        return None if found is None else (found[0].id, found[1].id)

    def context_window(self, provider: str, model: str) -> int | None:
        """The context window of a model in tokens; ``None`` if it is not listed."""
        found = self._find(provider, model)
        window = None if found is None else found[1].context_window
        return window if isinstance(window, int) else None

    def rates(self, provider: str, model: str, at: datetime, service_tier: str = "") -> Rates | None:
        """The prices of a model at a time; ``None`` if the model is not listed."""
        snapshot = self._snapshots.get_snapshot()
        key = (provider, model, service_tier, _minute(at))
        cached = self._cached.get(key)
        if cached is None or cached[0] is not snapshot:
            found = self._find(provider, model)
            prices = None if found is None else found[1].get_prices(at, _context(service_tier))
            rates = None if prices is None else Rates(self._rates_of(prices), self.source)
            cached = _remember(self._cached, key, (snapshot, rates))
        return cached[1]

    def candidates(self, provider: str, model: str, at: datetime, service_tier: str | None) -> list[Rates]:
        """All prices at which a call may be billed; empty if the model is not listed.

        Args:
            service_tier: the tier that the request names. The standard prices are included too, because
                the standard tier serves the call if the named tier is full. If ``None``, the provider chooses the tier,
                so the prices of all tiers are included.
        """
        if service_tier is not None:
            found = [self.rates(provider, model, at, tier) for tier in ("", service_tier)]
            return [rates for rates in found if rates is not None]
        snapshot, key = self._snapshots.get_snapshot(), (provider, model, _minute(at))
        cached = self._cached_tiers.get(key)
        if cached is None or cached[0] is not snapshot:
            different: list[Rates] = []
            for tier in ("", *self._tiers(provider, model)):
                rates = self.rates(provider, model, at, tier)
                if rates is not None and rates not in different:
                    different.append(rates)
            cached = _remember(self._cached_tiers, key, (snapshot, different))
        return cached[1]

    def _tiers(self, provider: str, model: str) -> list[str]:
        found = self._find(provider, model)
        whens = [] if found is None else [variant.when for variant in found[1].price_variants or ()]
        return sorted({when["service_tier"] for when in whens if when.keys() == {"service_tier"}})

    def _find(self, provider: str | None, model: str) -> Any:
        try:
            return self._snapshots.get_snapshot().find_provider_model(model, None, provider, None)
        except LookupError:
            return None

    def _rates_of(self, prices: Any) -> Iterator[Rate]:
        for key, price in vars(prices).items():
            if price is None or key.startswith("_"):
                continue
            unit = self._units[key]
            if hasattr(price, "tiers"):
                tiers = tuple((tier.start, _decimal(tier.price)) for tier in price.tiers)
                yield Rate(unit, _decimal(price.base), tiers)
            else:
                yield Rate(unit, _decimal(price))


def _minute(at: datetime) -> int:
    """Return the minute of a time, for use as a cache key. Listed prices change at whole minutes only."""
    return int(at.timestamp()) // 60


def _remember(cache: dict[Key, Value], key: Key, value: Value) -> Value:
    if len(cache) >= _CACHED_MAX:
        cache.clear()
    cache[key] = value
    return value


def _context(service_tier: str) -> dict[str, str] | None:
    """Return the selector of a tier in the price list; ``None`` for the standard tier.

    Providers use different names for the request parameter that selects the tier. The selector contains all names.
    """
    return dict.fromkeys(("service_tier", "speed", "processing"), service_tier) if service_tier else None


def _decimal(price: Decimal | float) -> Decimal:
    """An exact price; a float is converted through its ``repr``."""
    return price if isinstance(price, Decimal) else Decimal(repr(price))
