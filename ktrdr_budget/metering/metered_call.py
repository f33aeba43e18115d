"""One call of a language model, sync or async.

The worst case is reserved before the call. Usage is reported while the call runs. After the call, the call is settled:
its cost is committed, or its reservation is released or kept.

::

    (new) --enter--> open --finish(usage)---> the exact cost is committed
                      |---report(usage)-----> if the call breaks off, the reported cost is committed as an estimate
                      |---unreported()------> the worst case is committed as an estimate
                      |---rejected()--------> released: the provider did not accept the call
                      `---unknown()---------> kept until it expires and is charged: the provider may bill the call
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.errors import BudgetError, BudgetExceeded, InvalidArgument
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.metering import limiter_access
from ktrdr_budget.metering.call_pricing import CallPricing
from ktrdr_budget.metering.dual_flow import DualFlow, drive, drive_sync
from ktrdr_budget.metering.hold_claim import HoldClaim, claimable_hold
from ktrdr_budget.metering.instruments import CallInstruments
from ktrdr_budget.metering.prices import Pricer
from ktrdr_budget.metering.rates import Cost
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.models import OnExpiry
from ktrdr_budget.money import AmountIn, from_units
from ktrdr_budget.sync import BudgetLimiter

__all__ = ["CallTerms", "MeteredCall"]

logger = logging.getLogger("ktrdr_budget")

ESTIMATED = "estimated"
"""Marks ledger entries whose amount is not the provider's final figure."""
_LABEL_CHARACTERS_MAX = 256
_TOKENS_MAX = 2**40

Outcome = Literal["open", "finished", "unreported", "rejected", "unknown"]


@dataclass(frozen=True, slots=True)
class CallTerms:
    """What all calls of one meter have in common: limiter, prices, budgets."""

    limiter: AsyncBudgetLimiter | BudgetLimiter
    pricer: Pricer
    units: Mapping[str, str]
    """The unit of each budget; ``slots`` for a budget of that kind."""
    ttl: float
    """The ttl of reservations, in seconds."""
    on_expiry: OnExpiry

    @property
    def is_async(self) -> bool:
        """Whether calls need ``async with``."""
        return isinstance(self.limiter, AsyncBudgetLimiter)

    def count(self, *, nanos: int, tokens: int, slots: int) -> dict[str, int]:
        """Return, for each budget, how many of the budget's units one call uses."""
        counts = {"usd": nanos, "tokens": tokens, "requests": 1, "slots": slots}
        return {name: counts[unit] for name, unit in self.units.items()}

    def amounts(self, units: Mapping[str, int]) -> dict[str, AmountIn]:
        """Convert units to the amounts that the limiter's methods accept."""
        return {name: from_units(count, self.units[name]) for name, count in units.items()}

    def without_slots(self, units: Mapping[str, int]) -> dict[str, int]:
        """Set the units of slots to 0, because slots are held and never spent."""
        return {name: 0 if self.units[name] == "slots" else count for name, count in units.items()}


class MeteredCall:
    """The context manager of one call, created by :meth:`Meter.call`. It can be used once.

    Entering reserves the worst case. Leaving settles the call:

    - after :meth:`finish`: commits the exact cost of the provider's figures.
    - after :meth:`unreported`: commits the worst case, marked ``estimated`` in the ledger.
    - after :meth:`rejected`: releases the reservation.
    - after :meth:`unknown`, or on an error without any report: keeps the reservation, which expires and is charged.
      Inside a hold, the worst case is accrued on that hold instead, marked ``estimated``.
    - otherwise: commits the cost of the latest report, marked ``estimated``. If the report has no input, the upper
      bound of the input is added. If there is no report, the worst case is committed.

    If the settlement fails, the error is logged and not raised, because the caller has already paid for an answer. The
    limiter resends the settlement when the store replies again. Until then the reservation stays; if the reservation
    expires, it is charged.

    Raises:
        BudgetExceeded: on entering: the worst case does not fit; nothing is held.
        UnknownPrice: on entering: the model has no price.
        StoreUnavailable: on entering: the store did not reply within the deadline.
    """

    def __init__(
        self,
        terms: CallTerms,
        *,
        provider: str,
        model: str,
        input_tokens_max: int,
        output_tokens_max: int,
        operation: str,
        service_tier: str | None,
        other_max: Mapping[str, int],
        current: bool,
    ) -> None:
        _check_counts(input_tokens_max=input_tokens_max, output_tokens_max=output_tokens_max)
        _check_texts(provider=provider, model=model, operation=operation)
        self._terms = terms
        self.provider = provider
        self.model = model
        self.operation = operation
        self.input_tokens_max = input_tokens_max
        self.output_tokens_max = output_tokens_max
        self.output_hint = ""
        """Where ``output_tokens_max`` comes from, and how to lower it. The message of a denial contains this text."""
        self.worst_case: Cost | None = None
        """The highest possible cost; set on entering."""
        self.cost: Cost | None = None
        """The cost of the latest report."""
        self.usage: Usage | None = None
        """The latest report."""
        self.estimated = False
        """Whether the committed amount is not the provider's final figure."""
        self.hold: HoldBase | None = None
        """The call's own reservation; ``None`` before entering, or if an enclosing hold covers the call's budgets."""
        self._service_tier = service_tier
        self._other_max = other_max
        self._current = current
        self._instruments: CallInstruments | None = None
        self._pricing: CallPricing | None = None
        self._outcome: Outcome = "open"
        self._entered = self._left = False
        self._worst: dict[str, int] = {}
        self._own: dict[str, int] = {}
        """Units accrued so far on the call's own reservation."""
        self._claim: HoldClaim | None = None
        self._stop_heartbeat: Callable[[], object] | None = None

    def __repr__(self) -> str:
        return f"<MeteredCall {self._name} {self._outcome}>"

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self, usage: Usage) -> None:
        """Report the total usage so far.

        The cost of the usage is accrued at once. If the call breaks off, that cost is committed.

        Raises:
            InvalidArgument: the call's block has not begun, or has ended.
        """
        if self._is_final():
            return
        self._outcome = "open"
        self._set_usage(usage)
        used = self._units_used()
        if self._claim is not None:
            self._claim.use(used)
        if self.hold is not None:
            own = {name: max(used[name], before) for name, before in self._own.items()}
            self.hold.adjust({name: units - self._own[name] for name, units in own.items()})
            self._own = own

    def finish(self, usage: Usage) -> None:
        """Report the provider's final usage. Leaving the block commits its cost; other reports have no effect.

        A usage without input is not credible, and counts as :meth:`unreported`. There are two exceptions:
        ``input_tokens_max`` is 0, or the usage has other billed units.

        Raises:
            InvalidArgument: the call's block has not begun, or has ended.
        """
        if not usage.input_tokens and self.input_tokens_max and not any(usage.other.values()):
            self.unreported()
            return
        self._check_inside()
        self._outcome = "finished"
        self._set_usage(usage)

    def unreported(self) -> None:
        """Report an answer without a credible usage.

        The worst case is charged, or the cost of an earlier report if that cost is higher.
        """
        if self._is_final():
            return
        assert self.worst_case is not None
        if self.cost is not None and self.cost.nanos > self.worst_case.nanos:
            self._outcome = "open"
        else:
            self._outcome, self.usage, self.cost = "unreported", None, self.worst_case

    def rejected(self) -> None:
        """Report that the provider did not accept the call, and bills nothing."""
        if not self._is_final():
            self._outcome, self.usage, self.cost = "rejected", None, None

    def unknown(self) -> None:
        """Report a timeout or a lost connection, after which the provider may still bill the call."""
        if not self._is_final():
            self._outcome = "unknown"

    def _is_final(self) -> bool:
        """Whether :meth:`finish` was called. After it, other reports have no effect."""
        self._check_inside()
        return self._outcome == "finished"

    def _check_inside(self) -> None:
        if not self._entered or self._left:
            raise InvalidArgument("a call accepts reports inside its block only")

    # -- figures -------------------------------------------------------------------------------------------------------

    def _set_usage(self, usage: Usage) -> None:
        assert self._pricing is not None
        cost = self._pricing.cost(usage)
        self.estimated = cost is None
        self.usage, self.cost = usage, self.worst_case if cost is None else cost

    def _units_used(self) -> dict[str, int]:
        assert self.usage is not None and self.cost is not None
        return self._terms.count(nanos=self.cost.nanos, tokens=self.usage.total_tokens, slots=0)

    def _units_to_commit(self) -> dict[str, int] | None:
        """The units to commit, per budget; ``None`` if they are unknown."""
        if self._outcome == "finished":
            return self._units_used()
        if self._outcome == "rejected":
            return dict.fromkeys(self._worst, 0)
        self.estimated = True
        if self._outcome != "open" or self.usage is None:
            return None
        if not self.usage.input_tokens:
            assert self._pricing is not None
            self.usage, self.cost = self._pricing.with_input_bound(self.usage)
        return self._units_used()

    @property
    def _name(self) -> str:
        return f"{self.operation} {self.provider}/{self.model}"

    @property
    def _label(self) -> str:
        assert self.worst_case is not None
        source = self.worst_case.source
        return f"{self._name[: _LABEL_CHARACTERS_MAX - len(source) - 1]} {source}"

    # -- entering ------------------------------------------------------------------------------------------------------

    def enter_flow(self) -> DualFlow[None]:
        """Reserve the worst case. The errors are those of entering the call."""
        if self._instruments is not None:
            raise InvalidArgument("a call can be entered once only; create a new one")
        self._instruments = CallInstruments(
            self.operation, self.provider, self.model, list(self._terms.units), current=self._current
        )
        try:
            self._price()
            yield from self._admit()
        except BaseException as error:
            if isinstance(error, BudgetExceeded) and self._terms.units.get(error.budget) in ("usd", "tokens"):
                error.explanation = self._explanation()
            self._instruments.denied(error)
            raise
        assert self.worst_case is not None
        self._instruments.reserved(self.worst_case)
        self._entered = True

    def _explanation(self) -> str:
        """The reason for a large reservation, for the message of a denial."""
        tokens = f"{self.input_tokens_max:,} input and {self.output_tokens_max:,} output tokens"
        explanation = f"the worst case of {self.provider}/{self.model} is reserved: {tokens}"
        return f"{explanation} ({self.output_hint})" if self.output_hint else explanation

    def _price(self) -> None:
        self._pricing = CallPricing(
            self._terms.pricer,
            self.provider,
            self.model,
            limiter_access.store_time(self._terms.limiter),
            input_tokens_max=self.input_tokens_max,
            output_tokens_max=self.output_tokens_max,
            service_tier=self._service_tier,
            other_max=self._other_max,
        )
        self.worst_case = self._pricing.worst_case
        self._worst = self._terms.count(
            nanos=max(1, self.worst_case.nanos),  # at least one unit, so that a free call needs admission too
            tokens=max(1, self.input_tokens_max + self.output_tokens_max),
            slots=1,
        )

    def _admit(self) -> DualFlow[None]:
        """For budgets that the enclosing hold covers, claim from that hold. For the other budgets, reserve."""
        outer = claimable_hold(self._terms.limiter)
        covered = {window.budget for window, _ in outer.parts} if outer is not None else set()
        claimed = {name: units for name, units in self._worst.items() if name in covered}
        own = {name: units for name, units in self._worst.items() if name not in covered}
        if outer is not None and claimed:
            self._claim = HoldClaim(outer, claimed)
            yield from self._claim.claim()
        if own:
            try:
                yield from self._reserve(own)
            except BaseException:
                if self._claim is not None:
                    yield from self._close_claim(self._claim)
                raise

    def _reserve(self, own: Mapping[str, int]) -> DualFlow[None]:
        terms = self._terms
        reserve = partial(terms.limiter.reserve, terms.amounts(own), ttl=terms.ttl, on_expiry=terms.on_expiry)
        self.hold = hold = yield partial(reserve, operation=self._label)
        self._own = dict.fromkeys(own, 0)
        self._stop_heartbeat = limiter_access.start_heartbeat(terms.limiter, hold)

    # -- leaving -------------------------------------------------------------------------------------------------------

    def leave_flow(self, error: BaseException | None) -> DualFlow[None]:
        """Settle the call. Repeated calls have no effect.

        Args:
            error: the exception that ended the call; ``None`` without one.
        """
        if self._left or not self._entered:
            return
        units = self._units_to_commit()
        self._left = True
        if self._stop_heartbeat is not None:
            self._stop_heartbeat()
        try:
            if self.hold is not None:
                yield from self._settle_own(self.hold, units, keep=error is not None or self._outcome == "unknown")
        finally:
            try:
                if self._claim is not None:
                    yield from self._settle_claim(self._claim, units)
            finally:
                assert self._instruments is not None
                charged = [name for name, unit in self._terms.units.items() if unit == "usd"]
                self._instruments.ended(self.usage, self.cost, error, estimated=self.estimated, charged=charged)

    def _settle_own(self, hold: HoldBase, units: dict[str, int] | None, *, keep: bool) -> DualFlow[None]:
        if self._outcome == "rejected":
            yield from self._try(lambda: limiter_access.release(self._terms.limiter, hold))
        elif units is not None or not keep or self._outcome == "unreported":
            if self.estimated:
                hold.note(ESTIMATED)
            if units is None:
                self.cost, units = self.worst_case, self._worst
            spent = {name: units[name] for name in self._own if self._terms.units[name] != "slots"}
            amounts = self._terms.amounts(spent)
            yield from self._try(lambda: limiter_access.commit(self._terms.limiter, hold, amounts))

    def _settle_claim(self, claim: HoldClaim, units: dict[str, int] | None) -> DualFlow[None]:
        if units is None:
            self.cost, units = self.worst_case, self._terms.without_slots(self._worst)
        if any(units.values()):
            self._note_on(claim.hold)
        late = claim.use(units, final=True)
        try:
            yield from self._close_claim(claim)
        finally:
            if late:
                # Another caller settled the hold by its id during the call. The money is spent all the same.
                amounts = self._terms.amounts(late)
                yield from self._try(partial(limiter_access.record, self._terms.limiter, amounts, self._label))

    def _note_on(self, hold: HoldBase) -> None:
        """Add this call to the hold's label in the ledger.

        The price source and ``estimated`` come first, because a label that is too long is cut at its end.
        """
        assert self.worst_case is not None
        hold.note(self.worst_case.source, first=True)
        if self.estimated:
            hold.note(ESTIMATED, first=True)
        hold.note(self._name)

    def _close_claim(self, claim: HoldClaim) -> DualFlow[None]:
        """Drop the claim. If the hold's block has ended and this was the last call in progress, settle the hold."""
        block_exit = claim.close()
        if block_exit is not None:
            yield from self._try(partial(limiter_access.leave_hold, self._terms.limiter, claim.hold, block_exit))

    def _try(self, action: Callable[[], Any]) -> DualFlow[None]:
        try:
            yield action
        except (BudgetError, RuntimeError) as error:  # RuntimeError: the limiter is closed
            logger.error("settlement failed for %s: %s", self, error)

    # -- sync and async ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> MeteredCall:
        if not self._terms.is_async:
            raise TypeError("this meter's limiter is synchronous: use `with`")
        await drive(self.enter_flow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await drive(self.leave_flow(error))

    def __enter__(self) -> MeteredCall:
        if self._terms.is_async:
            raise TypeError("this meter's limiter is asynchronous: use `async with`")
        drive_sync(self.enter_flow())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        drive_sync(self.leave_flow(error))


def _check_counts(**counts: object) -> None:
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count <= _TOKENS_MAX:
            raise InvalidArgument(f"{name} must be a whole number of at least 0, not {count!r}")


def _check_texts(**texts: object) -> None:
    for name, text in texts.items():
        if not isinstance(text, str) or not text:
            raise InvalidArgument(f"{name} must be a non-empty string, not {text!r}")
