"""Every error that ktrdr-budget raises on purpose.

::

    BudgetError
    ├── BudgetExceeded            a limit denies; nothing was written
    ├── HoldConflict              the id is known with other contents, or is settled otherwise
    ├── UnknownHold               no hold has this id (never reserved, or forgotten after settlement)
    ├── TooManyHolds              the tenant has as many open and unconfirmed holds as it may
    ├── TooManyBudgets            the tenant has as many budgets as it may
    ├── UnknownBudget             no budget of this limiter has this name
    ├── UnknownPrice              there is no price for a model; nothing was sent
    ├── StoreUnavailable          the store gave no answer within the deadline
    │   └── StoreError            the store answered with an error (out of memory, read-only, no permission, …)
    └── InvalidArgument           (also a ValueError) a bad name, id or option; nothing was sent
        ├── InvalidAmount         not a finite, non-negative amount below $9,007,199.25
        ├── DefinitionConflict    another unit, period, timezone or kind of the budget is registered in the store
        └── UnmeteredCall         a guarded client's call would spend what cannot be bounded, or is not reported

The agent has some of its own, beside what raises them: ``MoneyDenied``, ``CycleActive``, ``UnknownCycle``,
``CycleEnded``, ``UnusableAnswer``.
"""

from __future__ import annotations

from collections.abc import Collection
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ktrdr_budget.models import Denial, HoldState
    from ktrdr_budget.money import Amount

__all__ = [
    "BudgetError",
    "BudgetExceeded",
    "BudgetMismatch",
    "DefinitionConflict",
    "HoldConflict",
    "InvalidAmount",
    "InvalidArgument",
    "StoreError",
    "StoreUnavailable",
    "TooManyBudgets",
    "TooManyHolds",
    "UnknownBudget",
    "UnknownHold",
    "UnknownPrice",
    "UnmeteredCall",
    "shown",
    "unknown_budget",
]

_NAMES_SHOWN = 5
_NAMES_COMPARED = 64


def shown(value: object) -> str:
    """What a message shows of a value that is not usable: its ``repr``, bounded, whatever the value is.

    A ``Decimal`` is shown as the number that it is: it was often read from JSON.
    """
    try:
        text = str(value) if isinstance(value, Decimal) else repr(value)
    except Exception:  # such as a whole number of more digits than Python writes
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


class BudgetError(Exception):
    """Base of all errors of this package."""


class BudgetExceeded(BudgetError):
    """A budget has no room for the request; nothing was written.

    Carries the fields of :class:`~ktrdr_budget.models.Denial`: ``budget, reason, limit, spent, held, unconfirmed,
    remaining, requested, fits, retry_after``.
    """

    def __init__(self, denial: Denial) -> None:
        super().__init__(denial)
        self.denial = denial
        self.explanation = ""
        """Why so much was requested, where the caller did not say the amount itself: a part of the message."""

    def __str__(self) -> str:
        return f"{self.denial.message}; {self.explanation}" if self.explanation else self.denial.message

    @property
    def budget(self) -> str:
        """Name of the first budget, in the order given, that denied."""
        return self.denial.budget

    @property
    def reason(self) -> str:
        """``exceeds_limit``, ``budget_held`` or ``budget_exhausted``."""
        return self.denial.reason

    @property
    def limit(self) -> Amount:
        """The limit in force."""
        return self.denial.limit

    @property
    def spent(self) -> Amount:
        """Confirmed spend of the window."""
        return self.denial.spent

    @property
    def held(self) -> Amount:
        """Sum of the open holds."""
        return self.denial.held

    @property
    def unconfirmed(self) -> Amount:
        """Charged for holds whose worker did not report in time."""
        return self.denial.unconfirmed

    @property
    def remaining(self) -> Amount:
        """``max(0, limit - spent - held - unconfirmed)``."""
        return self.denial.remaining

    @property
    def requested(self) -> Amount:
        """What was asked of this budget."""
        return self.denial.requested

    @property
    def fits(self) -> Amount:
        """The largest amount that this budget would have granted instead."""
        return self.denial.fits

    @property
    def retry_after(self) -> int | None:
        """Whole seconds, rounded up, until trying again can help; ``None`` if waiting cannot help."""
        return self.denial.retry_after


class HoldConflict(BudgetError):
    """The id is in use with other contents, or the hold was already settled differently. Nothing was changed.

    ``state`` is that of the hold with this id, where the store has told it. ``released_by_operator`` is set if an
    operator has released a hold that was to be extended or to grow: its worker can still commit what it cost.
    """

    def __init__(self, message: str, *, state: HoldState | None = None, released_by_operator: bool = False) -> None:
        super().__init__(message)
        self.state = state
        self.released_by_operator = released_by_operator


class UnknownHold(BudgetError):
    """No hold has this id: it was never granted, or it was settled longer ago than ids are remembered (24 h)."""


class TooManyHolds(BudgetError):
    """The tenant has as many holds, open and unconfirmed, as it may (``max_holds``); nothing was written.

    ``retry_after`` is whole seconds, rounded up, until the first open hold expires; ``None`` if none is open.
    """

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManyBudgets(BudgetError):
    """The tenant has as many budgets in the store as it may (``max_budgets``); nothing was written."""


class UnknownBudget(BudgetError, LookupError):
    """The limiter was not given a budget of this name."""


def unknown_budget(name: object, known: Collection[str], where: str = "this limiter") -> UnknownBudget:
    """The error for a name that is not among those known, which may be many: the closest few are in the message."""
    if not known:
        return UnknownBudget(f"unknown budget {shown(name)}; {where} has none")
    if len(known) <= _NAMES_SHOWN:
        return UnknownBudget(f"unknown budget {shown(name)}; {where} has: {', '.join(known)}")
    from bisect import bisect
    from difflib import get_close_matches

    # A comparison takes microseconds to milliseconds, so of many names only those are compared that begin alike.
    text = str(name)[:128]
    names = sorted(known)
    first = max(0, bisect(names, text) - _NAMES_COMPARED // 2)
    close = get_close_matches(text, names[first : first + _NAMES_COMPARED], n=_NAMES_SHOWN)
    hint = f", the closest: {', '.join(close)}" if close else ""
    return UnknownBudget(f"unknown budget {shown(name)}; {where} has {len(known):,}{hint}")


class UnknownPrice(BudgetError, LookupError):
    """There is no price for a model, so a call of it cannot be kept below a cap."""


class StoreUnavailable(BudgetError):
    """The store could not be asked within the deadline.

    ``ambiguous`` is true when the request may have been executed although its reply did not arrive. Repeating it with
    the same id is safe.

    ``reached`` is true when the store is there, but admits nothing now: it is being repaired, it can only be read, it
    loads its data; or the request was never sent. Policies for a store that is away (``allow``, ``lease``) then deny.
    """

    def __init__(self, message: str, *, ambiguous: bool = False, reached: bool = False) -> None:
        super().__init__(message)
        self.ambiguous = ambiguous
        self.reached = reached


class StoreError(StoreUnavailable):
    """The store replied with an error: nothing was admitted.

    ``fault`` is ``login`` if the store refuses the user or the password, ``protocol`` if the server is not a Redis
    server or its use of TLS contradicts the URL, else empty.
    """

    def __init__(self, message: str, *, ambiguous: bool = False, fault: Literal["", "login", "protocol"] = "") -> None:
        super().__init__(message, ambiguous=ambiguous, reached=True)
        self.fault = fault


class InvalidArgument(BudgetError, ValueError):
    """A name, id or option is not usable; nothing was sent."""


class InvalidAmount(InvalidArgument):
    """An amount is not a number, not finite, negative, fractional for a count, or 2**53 units or more."""


class DefinitionConflict(InvalidArgument):
    """A budget is registered in the store with another unit, period, timezone or kind; nothing was written.

    The first replica that reserves or records in a budget registers its definition. ``ktrdr budget migrate NAME``, or
    :meth:`~ktrdr_budget.AsyncBudgetLimiter.migrate`, replaces it. Holds that are open can be settled all the same.

    ``registered`` and ``configured`` are both sides, in words; empty where they are not known.
    """

    def __init__(self, message: str, *, registered: str = "", configured: str = "") -> None:
        super().__init__(message)
        self.registered = registered
        self.configured = configured


BudgetMismatch = DefinitionConflict
"""The former name of :class:`DefinitionConflict`."""


class UnmeteredCall(InvalidArgument):
    """A call of a guarded client would spend, but its cost cannot be bounded or is not reported. Nothing was sent."""
