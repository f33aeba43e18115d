"""One call of a language model: reserved before, reported while it runs, settled after. Sync and async alike.

::

    (new) --enter--> open --finish(usage)-----> its cost is committed, exactly
                      |---report(usage)-------> what is known is committed when it breaks off, as an estimate
                      |---unreported()--------> the worst case is committed, as an estimate
                      |---rejected()----------> released: the provider did not accept it
                      `---unknown()-----------> kept, and charged when it comes due: the provider may have worked
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from ktrdr_budget.engine.batching.heartbeat import Heartbeat
from ktrdr_budget.engine.calls.reads import Flow
from ktrdr_budget.engine.replica.hold import HoldBase
from ktrdr_budget.errors import BudgetError, BudgetExceeded, InvalidArgument
from ktrdr_budget.metering.draws import Draw
from ktrdr_budget.metering.instruments import CallInstruments
from ktrdr_budget.metering.rates import Cost
from ktrdr_budget.metering.steps import Steps, drive, drive_sync
from ktrdr_budget.metering.usage import Usage
from ktrdr_budget.money import AmountIn, from_units
from ktrdr_budget.periods import from_ms

if TYPE_CHECKING:
    from ktrdr_budget.metering.meter import Meter

__all__ = ["Call"]

logger = logging.getLogger("ktrdr_budget")

ESTIMATED = "estimated"
"""Marks ledger entries that are not a provider's final figures."""
_LABEL_CHARACTERS_MAX = 256
_TOKENS_MAX = 2**40

Outcome = Literal["open", "finished", "unreported", "rejected", "unknown"]


class Call:
    """Made by :meth:`Meter.call`; used with ``async with`` or ``with``, once.

    Entering reserves the worst case. Leaving settles:

    - after :meth:`finish`: commits the cost of the provider's figures, exactly;
    - after :meth:`unreported`: commits the worst case, marked ``estimated``;
    - after :meth:`rejected`: releases;
    - after :meth:`unknown`, or by an error with nothing reported: keeps the reservation, which comes due and is charged
      (inside a hold: accrues the worst case, marked ``estimated``);
    - otherwise commits what was reported last, never less than the input, marked ``estimated``; if nothing was, the
      worst case.

    A settlement that fails is logged and not raised, for the caller has paid for an answer. The limiter sends it again
    once the store answers; until then the reservation stays, and is charged if it comes due.

    Raises:
        BudgetExceeded: on entering: there is no room for the worst case; nothing is held.
        UnknownPrice: on entering: there is no price for the model.
        StoreUnavailable: on entering: no answer within the deadline.
    """

    def __init__(
        self,
        meter: Meter,
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
        for name, count in (("input_tokens_max", input_tokens_max), ("output_tokens_max", output_tokens_max)):
            if type(count) is not int or not 0 <= count <= _TOKENS_MAX:
                raise InvalidArgument(f"{name} must be a whole number, not negative, not {count!r}")
        for name, text in (("provider", provider), ("model", model), ("operation", operation)):
            if not isinstance(text, str) or not text:
                raise InvalidArgument(f"{name} must be a name, not {text!r}")
        self._meter = meter
        self.provider = provider
        self.model = model
        self.operation = operation
        self.input_tokens_max = input_tokens_max
        self.output_tokens_max = output_tokens_max
        self.output_hint = ""
        """Where its bound of output tokens comes from, and how to lower it: shown when the call is denied."""
        self.worst_case: Cost | None = None
        """The most that it may cost, once it is entered."""
        self.cost: Cost | None = None
        """What it costs as far as its last report tells."""
        self.usage: Usage | None = None
        """What was reported last."""
        self.estimated = False
        """Whether what was committed is not the provider's final figure."""
        self.hold: HoldBase | None = None
        """Its own reservation, if it has one."""
        self._service_tier = service_tier
        self._other_max = other_max
        self._current = current
        self._instruments: CallInstruments | None = None
        self._at: datetime | None = None
        self._outcome: Outcome = "open"
        self._entered = self._left = False
        self._worst: dict[str, int] = {}
        self._own: dict[str, int] = {}
        """Accrued on its own reservation so far, in whole units."""
        self._draw: Draw | None = None
        self._stop_heartbeat: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<Call {self.operation} {self.provider}/{self.model} {self._outcome}>"

    # -- what happens to it --------------------------------------------------------------------------------------------

    def report(self, usage: Usage) -> None:
        """What it has used so far, in total: accrued at once, and committed should it break off.

        Raises:
            InvalidArgument: it is not entered, or has ended.
        """
        if not self._goes_on():
            return
        self._outcome = "open"
        self.usage, self.cost = usage, self._price(usage)
        used = self._units(usage, self.cost)
        if self._draw is not None:
            self._draw.use(used)
        if self.hold is not None:
            own = {name: max(used[name], before) for name, before in self._own.items()}
            self.hold.adjust({name: units - self._own[name] for name, units in own.items()})
            self._own = own

    def finish(self, usage: Usage) -> None:
        """The provider's final figures. They are committed when the block is left, whatever was reported before.

        A usage without input is not credible, unless the call can have none or something besides tokens is billed: it
        is as if the provider had reported none (:meth:`unreported`).

        Raises:
            InvalidArgument: it is not entered, or has ended.
        """
        if not usage.input_tokens and self.input_tokens_max and not any(usage.other.values()):
            self.unreported()
            return
        self._goes_on()
        self._outcome, self.usage, self.cost = "finished", usage, self._price(usage)

    def unreported(self) -> None:
        """The provider has answered, and reported no credible usage: the worst case is charged.

        If more was reported before, that is charged.
        """
        if not self._goes_on():
            return
        assert self.worst_case is not None
        if self.cost is not None and self.cost.nanos > self.worst_case.nanos:
            self._outcome = "open"
        else:
            self._outcome, self.usage, self.cost = "unreported", None, self.worst_case

    def rejected(self) -> None:
        """The provider did not accept the call, and bills nothing."""
        if self._goes_on():
            self._outcome, self.usage, self.cost = "rejected", None, None

    def unknown(self) -> None:
        """Nobody knows whether the provider did the work: a timeout, or a lost connection."""
        if self._goes_on():
            self._outcome = "unknown"

    def _goes_on(self) -> bool:
        """Whether it is not finished: of what is said of a call the latest counts, but final figures are final."""
        if not self._entered or self._left:
            raise InvalidArgument("a call is reported on inside its block")
        return self._outcome != "finished"

    # -- figures -------------------------------------------------------------------------------------------------------

    def _price(self, usage: Usage) -> Cost:
        assert self._at is not None and self.worst_case is not None
        self.estimated = False
        try:
            return self._meter.pricer.price(self.provider, self.model, usage, self._at)
        except Exception as error:
            # The money is spent already: what cannot be priced is charged in full, and its answer is not lost.
            logger.error("the usage of %s/%s cannot be priced: %s", self.provider, self.model, error)
            self.estimated = True
            return self.worst_case

    def _units(self, usage: Usage, cost: Cost) -> dict[str, int]:
        """What a usage counts, per budget."""
        counts = {"usd": cost.nanos, "tokens": usage.total_tokens, "requests": 1, "slots": 0}
        return {name: counts[unit] for name, unit in self._meter.units.items()}

    def _known(self) -> dict[str, int] | None:
        """What is to be committed; ``None`` if that is not known, and so the worst case."""
        if self._outcome == "finished":
            assert self.usage is not None and self.cost is not None
            return self._units(self.usage, self.cost)
        if self._outcome == "rejected":
            return dict.fromkeys(self._worst, 0)
        known = None
        if self._outcome == "open" and self.usage is not None:
            if not self.usage.input_tokens:
                self._bound_input(self.usage)
            assert self.cost is not None
            known = self._units(self.usage, self.cost)
        self.estimated = True
        return known

    def _bound_input(self, usage: Usage) -> None:
        """The input was sent, and is billed: it was not counted yet, but bounded, and its price like that."""
        assert self._at is not None
        other = {name: count for name, count in usage.other.items() if not name.startswith("input_")}
        tier = usage.service_tier
        self.usage = Usage(self.input_tokens_max, usage.output_tokens, service_tier=tier, other=other)
        try:
            # It may have been written to a cache, and a tier that was not told may be the dearest.
            self.cost = self._cost_max(usage.output_tokens, self._at, tier or self._service_tier, other)
        except Exception as error:
            logger.error("the usage of %s/%s cannot be priced: %s", self.provider, self.model, error)
            self.cost = self.worst_case

    @property
    def _label(self) -> str:
        assert self.worst_case is not None
        source = self.worst_case.source
        return f"{self._named[: _LABEL_CHARACTERS_MAX - len(source) - 1]} {source}"

    @property
    def _named(self) -> str:
        return f"{self.operation} {self.provider}/{self.model}"

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def enter_steps(self) -> Steps[None]:
        """What entering does; errors as for the class."""
        if self._instruments is not None:
            raise InvalidArgument("a call is entered once; make another")
        self._instruments = CallInstruments(
            self.operation, self.provider, self.model, list(self._meter.units), current=self._current
        )
        try:
            yield from self._take()
        except BaseException as error:
            if isinstance(error, BudgetExceeded) and self._meter.units.get(error.budget) in ("usd", "tokens"):
                error.explanation = self._explanation()
            self._instruments.denied(error)
            raise
        assert self.worst_case is not None
        self._instruments.reserved(self.worst_case)
        self._entered = True

    def _explanation(self) -> str:
        """Why a call needs so much: its worst case is reserved, not what it will cost."""
        tokens = f"{self.input_tokens_max:,} input and {self.output_tokens_max:,} output tokens"
        words = f"the worst case of {self.provider}/{self.model} is reserved: {tokens}"
        return f"{words} ({self.output_hint})" if self.output_hint else words

    def _take(self) -> Steps[None]:
        meter = self._meter
        self._at = from_ms(meter.limiter._session.now_ms())
        self.worst_case = self._cost_max(self.output_tokens_max, self._at, self._service_tier, self._other_max)
        counts = {
            "usd": max(1, self.worst_case.nanos),  # a call that is free still asks for admission
            "tokens": max(1, self.input_tokens_max + self.output_tokens_max),
            "requests": 1,
            "slots": 1,
        }
        self._worst = {name: counts[unit] for name, unit in meter.units.items()}
        outer = meter.outer_hold()
        there = {window.budget for window, _ in outer.parts} if outer is not None else set()
        drawn = {name: units for name, units in self._worst.items() if name in there}
        own = {name: units for name, units in self._worst.items() if name not in there}
        if outer is not None and drawn:
            self._draw = Draw(outer, drawn)
            yield from self._draw.claim()
        if own:
            try:
                yield from self._reserve(own)
            except BaseException:
                if self._draw is not None:
                    yield from self._close_draw(self._draw)
                raise

    def _cost_max(
        self, output_tokens_max: int, at: datetime, service_tier: str | None, other_max: Mapping[str, int]
    ) -> Cost:
        further: dict[str, Any] = {}
        if service_tier is not None:
            further["service_tier"] = service_tier
        if other_max:
            further["other_max"] = other_max
        return self._meter.pricer.worst_case(
            self.provider, self.model, self.input_tokens_max, output_tokens_max, at, **further
        )

    def _reserve(self, own: Mapping[str, int]) -> Steps[None]:
        meter = self._meter
        amounts = self._amounts(own)
        reserve = partial(meter.limiter.reserve, amounts, ttl=meter.ttl, on_expiry=meter.on_expiry)
        self.hold = hold = yield partial(reserve, operation=self._label)
        self._own = dict.fromkeys(own, 0)
        self._stop_heartbeat = _start_heartbeat(meter.limiter, hold)

    def leave_steps(self, error: BaseException | None) -> Steps[None]:
        """What leaving does, once; ``error``: what ended the call."""
        if self._left or not self._entered:
            return
        known = self._known()
        self._left = True
        if self._stop_heartbeat is not None:
            self._stop_heartbeat()
        try:
            if self.hold is not None:
                yield from self._settle_own(self.hold, known, keep=error is not None or self._outcome == "unknown")
        finally:
            try:
                if self._draw is not None:
                    yield from self._settle_draw(self._draw, known)
            finally:
                assert self._instruments is not None
                charged = [name for name, unit in self._meter.units.items() if unit == "usd"]
                self._instruments.ended(self.usage, self.cost, error, estimated=self.estimated, charged=charged)

    def _settle_draw(self, draw: Draw, known: dict[str, int] | None) -> Steps[None]:
        hold, used = draw.hold, known
        if used is None:
            self.cost = self.worst_case
            used = {name: 0 if self._meter.units[name] == "slots" else units for name, units in self._worst.items()}
        if any(used.values()):
            assert self.worst_case is not None
            # Of what many calls say models may be cut off, but not whose prices these are, nor that they are guesses.
            hold.note(self.worst_case.source, first=True)
            if self.estimated:
                hold.note(ESTIMATED, first=True)
            hold.note(self._named)
        late = draw.use(used, final=True)
        try:
            yield from self._close_draw(draw)
        finally:
            if late:
                # The hold was settled by its id while the call was under way. Spend is a fact all the same.
                core, amounts = self._meter.limiter._core, self._amounts(late)
                yield from self._conclude(lambda: core.record(amounts, None, None, self._label), "record")

    def _close_draw(self, draw: Draw) -> Steps[None]:
        """Ends the claim, and settles the hold if its block was left and this was the last call inside."""
        left = draw.close()
        if left is not None:
            yield from self._settle(partial(self._meter.limiter._leave, draw.hold, *left))  # type: ignore[arg-type]

    def _conclude(self, flow: Callable[[], Flow[Any]], operation: str) -> Steps[None]:
        """Settle for good: what the store does not answer is sent again once it does."""
        limiter = self._meter.limiter
        yield from self._settle(lambda: limiter._conclude(flow(), operation))

    def _settle_own(self, hold: HoldBase, known: dict[str, int] | None, *, keep: bool) -> Steps[None]:
        if self._outcome == "rejected":
            yield from self._conclude(hold.release_flow, "release")
        elif known is not None or not keep or self._outcome == "unreported":
            if self.estimated:
                hold.note(ESTIMATED)
            if known is None:
                self.cost = self.worst_case
            committed = self._worst if known is None else known
            spent = {name: committed[name] for name in self._own if self._meter.units[name] != "slots"}
            yield from self._conclude(lambda: hold.commit_flow(self._amounts(spent)), "commit")

    def _settle(self, settle: Callable[[], Any]) -> Steps[None]:
        try:
            yield settle
        except (BudgetError, RuntimeError) as error:  # the latter: the limiter is closed
            logger.error("%s could not be settled: %s", self, error)

    def _amounts(self, units: Mapping[str, int]) -> dict[str, AmountIn]:
        named = self._meter.units
        return {name: from_units(count, named[name]) for name, count in units.items()}

    # -- sync and async ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Call:
        if not self._meter.is_async:
            raise TypeError("this meter's limiter is synchronous: use `with`")
        await drive(self.enter_steps())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await drive(self.leave_steps(error))

    def __enter__(self) -> Call:
        if self._meter.is_async:
            raise TypeError("this meter's limiter is asynchronous: use `async with`")
        drive_sync(self.enter_steps())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        drive_sync(self.leave_steps(error))


def _start_heartbeat(limiter: Any, hold: Any) -> Callable[[], None]:
    """Prolongs a hold as ``limiter.hold(...)`` does; returns what stops that."""
    if not hasattr(limiter, "_portal"):
        return Heartbeat(limiter._coalescer, hold).stop
    portal = limiter._portal
    started: list[Heartbeat] = []
    # Without waiting for either: that thread does one after the other.
    portal.tell(lambda: started.append(Heartbeat(limiter._coalescer, hold)))
    return partial(portal.tell, lambda: started[0].stop())
