"""Reserves what a call of a language model may cost, and commits what it did cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ktrdr_budget.engine.replica.hold import HoldBase, current_hold
from ktrdr_budget.errors import InvalidArgument, shown, unknown_budget
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.metering.calls import Call
from ktrdr_budget.metering.prices import Pricer, Prices
from ktrdr_budget.models import TTL_DEFAULT_S, OnExpiry, check_on_expiry, check_ttl_ms
from ktrdr_budget.sync import BudgetLimiter

__all__ = ["Call", "Meter"]

_COUNTED = ("tokens", "requests")
_NOTHING: Mapping[str, int] = {}


class Meter:
    """Keeps calls of language models below the cap of their budgets. Safe to share between tasks or threads.

    ``async with meter.call(...)`` with an :class:`AsyncBudgetLimiter`, ``with meter.call(...)`` with a
    :class:`BudgetLimiter`. A call inside ``limiter.hold(...)`` draws from that hold, as far as the hold has its
    budgets, and grows it when needed.

    Args:
        budgets: what each call is charged to: dollars, ``tokens`` (input and output), ``requests`` (1), and budgets of
            kind ``slots`` (1 while the call lasts).
        pricer: what calls cost; by default :meth:`Prices.from_environment`.
        ttl: seconds that a worker may be silent; heartbeats prolong a reservation while its call lasts.
        on_expiry: what counts if the worker dies, as for :meth:`AsyncBudgetLimiter.reserve`.

    Raises:
        InvalidArgument: an argument is not usable, or a budget counts something else.
        UnknownBudget: the limiter was not given such a budget.
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
            raise InvalidArgument(f"pricer must have the methods of Prices, not be {shown(pricer)}")
        if isinstance(budgets, str) or not budgets:
            raise InvalidArgument(f"budgets must be one name or more, in a list, not {budgets!r}")
        check_on_expiry(on_expiry)
        self.limiter = limiter
        self.pricer: Pricer = Prices.from_environment() if pricer is None else pricer
        self.units = {name: _unit(limiter, name) for name in budgets}
        """The unit of each budget; ``slots`` for one of that kind."""
        self.ttl = ttl
        self.on_expiry: OnExpiry = on_expiry

    def __repr__(self) -> str:
        return f"<Meter budgets={list(self.units)} of {self.limiter!r}>"

    @property
    def is_async(self) -> bool:
        """Whether its calls are for ``async with``."""
        return isinstance(self.limiter, AsyncBudgetLimiter)

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
    ) -> Call:
        """One call, as a context manager: entering reserves its worst case, leaving settles it.

        Args:
            provider: as the price list names it: ``anthropic``, ``openai``, ``google``, …
            input_tokens_max: no fewer than the provider will count.
            output_tokens_max: what the call limits its output to, reasoning included.
            operation: what is done, in the words of OpenTelemetry: ``chat``, ``embeddings``, …
            service_tier: the tier that the call asks for; ``None`` if it leaves that to the provider, whose dearest one
                is reserved then.
            other_max: bounds of what is billed besides tokens, such as ``{"web_searches": 5}``.
            current: its span is the current one while it lasts. ``False`` for a call that may end in another task than
                it began in, such as a stream.

        Raises:
            InvalidArgument: an argument is not usable. The other errors come on entering, see :class:`Call`.
        """
        return Call(
            self,
            provider=provider,
            model=model,
            input_tokens_max=input_tokens_max,
            output_tokens_max=output_tokens_max,
            operation=operation,
            service_tier=service_tier,
            other_max=other_max,
            current=current,
        )

    def outer_hold(self) -> HoldBase | None:
        """The hold that a call made now would draw from."""
        hold = current_hold.get()
        if hold is None or hold.settled or hold.settling or not hold.belongs_to(self.limiter):
            return None
        if hold.growth is not None and hold.growth.left is not None:
            return None  # its block was left; it is open for the calls that were under way then
        return hold


def _unit(limiter: AsyncBudgetLimiter | BudgetLimiter, name: str) -> str:
    try:
        budget = limiter.budgets[name]
    except KeyError:
        raise unknown_budget(name, limiter.budgets) from None
    if budget.kind == "slots":
        return "slots"
    if budget.unit != "usd" and budget.unit not in _COUNTED:
        raise InvalidArgument(f"{name!r} counts {budget.unit}: a call is counted in dollars, tokens or requests")
    return budget.unit
