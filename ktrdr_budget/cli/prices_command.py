"""``ktrdr prices show``: the price of a model and its source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from ktrdr_budget.cli.errors import CommandError, InvalidInput
from ktrdr_budget.cli.output import Table, fields, write, write_json
from ktrdr_budget.errors import InvalidArgument, UnknownPrice

if TYPE_CHECKING:
    from ktrdr_budget.metering.prices import Prices
    from ktrdr_budget.metering.rates import Cost, Rate, Rates
    from ktrdr_budget.metering.usage import Usage

__all__ = ["prices"]

_TOKENS = click.IntRange(0, 10**9)
ANY_PROVIDER = "any"
"""The provider of a model whose provider is unknown. The model then has the fixed cost per call, or no price."""


@click.group()
def prices() -> None:
    """Prices of language models."""


@prices.command()
@click.argument("model")
@click.option(
    "--provider",
    help="Provider of the model, such as anthropic, openai or google. Default: derived from the model's name.",
)
@click.option("--input", "input_tokens", type=_TOKENS, help="Number of input tokens of a call, cached tokens included.")
@click.option("--output", "output_tokens", type=_TOKENS, help="Number of output tokens of a call.")
@click.option("--cached", type=_TOKENS, help="Number of input tokens read from a cache.")
@click.option("--cache-write", type=_TOKENS, help="Number of input tokens written to a cache.")
@click.option("--tier", default="", help="Service tier of the provider, such as priority, flex or batch.")
@click.option("--json", "as_json", is_flag=True, help="Print the prices as JSON, with amounts as decimal strings.")
def show(
    model: str,
    provider: str | None,
    input_tokens: int | None,
    output_tokens: int | None,
    cached: int | None,
    cache_write: int | None,
    tier: str,
    as_json: bool,
) -> None:
    """Show the prices of MODEL, or the cost of a call.

    Prices come from KTRDR_PRICES_FILE, else from the price list of genai-prices, else from KTRDR_FIXED_CALL_COST. If
    numbers of tokens are given, the command shows the cost of a call with these numbers, and the maximum cost, which is
    reserved before the call.
    """
    counts = (input_tokens, output_tokens, cached, cache_write)
    with _errors():
        found = _find(provider, model, tier)
        cost, worst = found.costs(_usage(counts, tier)) if any(count is not None for count in counts) else (None, None)
    if as_json:
        write_json(_document(found, cost, worst))
    else:
        _write(found, cost, worst)


class _Found:
    """A model with its prices."""

    def __init__(self, source: Prices, provider: str, model: str, tier: str, now: datetime) -> None:
        self._prices = source
        self.provider = provider
        self.model = model
        self.tier = tier
        self._now = now
        self.rates = source.rates(provider, model, now, tier) or _fixed(source, provider, model, now)
        self.source = self.rates.source

    @property
    def listed(self) -> str:
        """The name of the model in the price list, or an empty text if the price has another source."""
        if not self.source.startswith("genai-prices"):
            return ""
        names = self._prices.price_list.find(self.provider, self.model)
        return names[1] if names else ""

    def costs(self, usage: Usage) -> tuple[Cost, Cost]:
        """Return the cost of this usage, and the maximum cost of a call with the same numbers of tokens."""
        names = (self.provider, self.model)
        tier = self.tier or None
        worst = self._prices.worst_case(*names, usage.input_tokens, usage.output_tokens, self._now, service_tier=tier)
        return self._prices.price(*names, usage, self._now), worst


def _fixed(source: Prices, provider: str, model: str, now: datetime) -> Rates:
    """Return the fixed cost per call, for a model without a price. If no fixed cost is set, raise ``UnknownPrice``."""
    from ktrdr_budget.metering.rates import UNITS, Rate, Rates

    cost = source.worst_case(provider, model, 1, 1, now)
    (unit,) = (unit for unit in UNITS if unit.name == "requests")
    return Rates([Rate(unit, Decimal(cost.amount))], cost.source)


def _find(provider: str | None, model: str, tier: str) -> _Found:
    from ktrdr_budget.agent.scripted import SCRIPTED_PRICE
    from ktrdr_budget.metering.prices import Prices

    source = Prices.from_environment(overrides=[SCRIPTED_PRICE])
    if provider is None:
        provider = source.provider_of(model)
        if provider is None and source.fixed_cost is not None:
            provider = ANY_PROVIDER
        if provider is None:
            raise CommandError(f"unknown provider of model {model!r}; give --provider")
    return _Found(source, provider, model, tier, datetime.now(UTC))


def _usage(counts: Iterable[int | None], tier: str) -> Usage:
    from ktrdr_budget.metering.usage import Usage

    input_tokens, output_tokens, cached, cache_write = (count or 0 for count in counts)
    return Usage(input_tokens, output_tokens, cached, cache_write, service_tier=tier)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except UnknownPrice as error:
        raise CommandError(str(error)) from None
    except InvalidArgument as error:
        raise InvalidInput(str(error)) from None
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from None  # the message names the package to install


# -- output ------------------------------------------------------------------------------------------------------------


def _write(found: _Found, cost: Cost | None, worst: Cost | None) -> None:
    name = f"{found.provider}/{found.model}" + (f", served as {found.tier}" if found.tier else "")
    source = found.source if cost is None else cost.source
    listed = f", listed as {found.listed}" if found.listed not in ("", found.model) else ""
    write(fields([("Model", name), ("Prices", source + listed)]) + "\n")
    if cost is None or worst is None:
        table = Table("PART", ">PRICE", "PER")
        table.write([_rate_row(rate, price, note) for rate, price, note in _prices_of(found.rates)])
        return
    table = Table("PART", ">COUNT", ">PRICE", "PER", ">AMOUNT")
    rows = [[line.name, line.count, _dollars(line.price), _per(line.per), _dollars(line.amount)] for line in cost.lines]
    table.write([*rows, ["total", "", "", "", _dollars(Decimal(cost.amount))]])
    write(f"\nReserved before the call (maximum cost): {_dollars(Decimal(worst.amount))}")


def _prices_of(rates: Iterable[Rate]) -> Iterator[tuple[Rate, Decimal, str]]:
    for rate in rates:
        yield rate, rate.price, ""
        for start, price in rate.tiers:
            yield rate, price, f", above {start} input tokens"


def _rate_row(rate: Rate, price: Decimal, note: str) -> list[str]:
    return [rate.name, _dollars(price), _per(rate.unit.per) + note]


def _per(count: int) -> str:
    return {1: "1", 1000: "thousand", 1_000_000: "million", 1_000_000_000: "billion"}.get(count, str(count))


def _dollars(value: Decimal) -> str:
    return f"${_plain(value)}"


def _plain(value: Decimal) -> str:
    """Format a number with all digits and at least two decimals. A price may be below a nano-dollar."""
    whole, _, decimals = f"{value:f}".partition(".")
    return f"{whole}.{decimals.rstrip('0').ljust(2, '0')}"


def _document(found: _Found, cost: Cost | None, worst: Cost | None) -> dict[str, Any]:
    names = {"provider": found.provider, "model": found.model, "service_tier": found.tier or None}
    source = found.source if cost is None else cost.source
    document: dict[str, Any] = {**names, "source": source, "listed_as": found.listed or None}
    document["prices"] = [_rate_document(rate) for rate in found.rates]
    if cost is not None and worst is not None:
        document["lines"] = [
            {
                "part": line.name,
                "count": line.count,
                "price": _plain(line.price),
                "per": line.per,
                "amount": _plain(line.amount),
            }
            for line in cost.lines
        ]
        document |= {"total": _plain(Decimal(cost.amount)), "reserved": _plain(Decimal(worst.amount))}
    return document


def _rate_document(rate: Rate) -> Mapping[str, Any]:
    tiers = [{"above_input_tokens": start, "price": _plain(price)} for start, price in rate.tiers]
    return {"part": rate.name, "price": _plain(rate.price), "per": rate.unit.per, "tiers": tiers}
