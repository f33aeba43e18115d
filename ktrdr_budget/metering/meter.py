"""Reserve the worst case of language model calls, and commit their actual cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ktrdr_budget.errors import InvalidArgument, shown, unknown_budget
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.metering.metered_call import CallTerms, MeteredCall
from ktrdr_budget.metering.prices import Pricer, Prices
from ktrdr_budget.models import TTL_DEFAULT_S, OnExpiry, check_on_expiry, check_ttl_ms
from ktrdr_budget.sync import BudgetLimiter

__all__ = ["Meter", "MeteredCall"]

_COUNTED = ("tokens", "requests")
_NOTHING: Mapping[str, int] = {}


class Meter:
    """Keeps the cost of language model calls below the caps of budgets.

    Tasks or threads can share a meter. Use ``async with meter.call(...)`` with an :class:`AsyncBudgetLimiter`, and
    ``with meter.call(...)`` with a :class:`BudgetLimiter`.

    Inside ``limiter.hold(...)``, a call reserves nothing on the budgets that the hold covers. The call claims its worst
    case from the hold, and grows the hold if needed.

    Args:
        budgets: the budgets charged by each call: dollars, ``tokens`` (input and output), ``requests`` (1 per call),
            and budgets of kind ``slots`` (1 while the call lasts).
        pricer: the source of prices; by default :meth:`Prices.from_environment`.
        ttl: seconds until the reservation of a dead worker expires; heartbeats extend the reservation during the call.
        on_expiry: the amount charged on expiry, as for :meth:`AsyncBudgetLimiter.reserve`.

    Raises:
        InvalidArgument: an argument is invalid, or a budget has a unit that a meter cannot count.
        UnknownBudget: the limiter has no such budget.
    """

    def __init__(
        self,
        limiter: AsyncBudgetLimiter | BudgetLimiter,
        budgets: Sequence[str] = ("agent",),
        pricer: Pricer | None = None,
        *,
        ttl: float = TTL_DEFAULT_S,
        on_expiry: OnExpiry = "charge",
    ) -> None:
        check_ttl_ms(ttl)
        if not isinstance(limiter, (AsyncBudgetLimiter, BudgetLimiter)):
            raise InvalidArgument(f"limiter must be an AsyncBudgetLimiter or a BudgetLimiter, not {shown(limiter)}")
        if pricer is not None and not all(callable(getattr(pricer, name, None)) for name in ("price", "worst_case")):
            raise InvalidArgument(
                f"pricer must have the methods price and worst_case, as Prices has, not {shown(pricer)}"
            )
        if isinstance(budgets, str) or not budgets:
            raise InvalidArgument(f"budgets must be a non-empty list of names, not {budgets!r}")
        check_on_expiry(on_expiry)
        units = {name: _unit(limiter, name) for name in budgets}
        self._terms = CallTerms(limiter, Prices.from_environment() if pricer is None else pricer, units, ttl, on_expiry)

    def __repr__(self) -> str:
        return f"<Meter budgets={list(self.units)} of {self.limiter!r}>"

    @property
    def limiter(self) -> AsyncBudgetLimiter | BudgetLimiter:
        """The limiter that grants the reservations."""
        return self._terms.limiter

    @property
    def pricer(self) -> Pricer:
        """The source of prices."""
        return self._terms.pricer

    @property
    def units(self) -> Mapping[str, str]:
        """The unit of each budget; ``slots`` for a budget of that kind."""
        return self._terms.units

    def call(
        self,
        *,
        provider: str,
        model: str,
        input_tokens_max: int,
        output_tokens_max: int,
        operation: str = "chat",
        service_tier: str | None = None,
        other_max: Mapping[str, int] = _NOTHING,
        current: bool = True,
    ) -> MeteredCall:
        """Create a context manager for one call. Entering it reserves the worst case; leaving it settles the call.

        Args:
            provider: the provider's name in the price list: ``anthropic``, ``openai``, ``google``, …
            input_tokens_max: an upper bound of the input tokens that the provider will count.
            output_tokens_max: the output limit that the request sets. It includes reasoning tokens.
            operation: the operation, as OpenTelemetry names it: ``chat``, ``embeddings``, …
            service_tier: the tier that the request names. If ``None``, the provider chooses the tier, and the price of
                the most expensive tier is reserved.
            other_max: upper bounds of billed units other than tokens, such as ``{"web_searches": 5}``.
            current: whether the call's span is the current span while the call lasts. Pass ``False`` if the call may
                end in another task than it began in, as a stream may.

        Raises:
            InvalidArgument: an argument is invalid. For the errors on entering, see :class:`MeteredCall`.
        """
        return MeteredCall(
            self._terms,
            provider=provider,
            model=model,
            input_tokens_max=input_tokens_max,
            output_tokens_max=output_tokens_max,
            operation=operation,
            service_tier=service_tier,
            other_max=other_max,
            current=current,
        )


def _unit(limiter: AsyncBudgetLimiter | BudgetLimiter, name: str) -> str:
    try:
        budget = limiter.budgets[name]
    except KeyError:
        raise unknown_budget(name, limiter.budgets) from None
    if budget.kind == "slots":
        return "slots"
    if budget.unit != "usd" and budget.unit not in _COUNTED:
        raise InvalidArgument(f"{name!r} counts {budget.unit}; a meter supports dollars, tokens, requests and slots")
    return budget.unit
