"""Exceptions of ktrdr-budget.

::

    BudgetError
    ├── BudgetExceeded            a limit denies the request; nothing was written
    ├── HoldConflict              the id is in use with other contents, or the hold was settled differently
    ├── UnknownHold               no hold has this id (never reserved, or forgotten after settlement)
    ├── TooManyHolds              the tenant has the maximum number of open and unconfirmed holds
    ├── TooManyBudgets            the tenant has the maximum number of budgets
    ├── UnknownBudget             the limiter has no budget of this name
    ├── KeyConflict               another access key has the name, or the tenant has the maximum number of keys
    ├── UnknownKey                no access key has this name
    ├── UnknownPrice              the model has no price; nothing was sent
    ├── StoreUnavailable          the store did not reply within the timeout
    │   └── StoreError            the store replied with an error (out of memory, read-only, no permission, …)
    └── InvalidArgument           (also a ValueError) an invalid name, id or option; nothing was sent
        ├── InvalidAmount         not a finite, non-negative amount below $9,007,199.25
        ├── InvalidScope          a field or value of a scope is invalid, or a budget's name made of it is
        ├── DefinitionConflict    the store has another unit, period, timezone or kind of the budget
        └── UnmeteredCall         the cost of a guarded client's call cannot be bounded or is not reported

The agent adds ``MoneyDenied``, ``CycleActive``, ``UnknownCycle``, ``CycleEnded`` and ``UnusableAnswer``, each next to
the code that raises it.
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
    "InvalidScope",
    "KeyConflict",
    "StoreError",
    "StoreUnavailable",
    "TooManyBudgets",
    "TooManyHolds",
    "UnknownBudget",
    "UnknownHold",
    "UnknownKey",
    "UnknownPrice",
    "UnmeteredCall",
    "shown",
    "unknown_budget",
]

_NAMES_SHOWN = 5
_NAMES_COMPARED = 64


def shown(value: object) -> str:
    """Format a rejected value for a message: its ``repr``, limited to 80 characters.

    A ``Decimal`` is formatted as a number, since it was often read from JSON.
    """
    try:
        text = str(value) if isinstance(value, Decimal) else repr(value)
    except Exception:  # such as an integer with more digits than Python formats
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


class BudgetError(Exception):
    """Base class of all errors of this package."""


class BudgetExceeded(BudgetError):
    """A budget cannot cover the request; nothing was written.

    Has the fields of :class:`~ktrdr_budget.models.Denial`: ``budget, reason, limit, spent, held, unconfirmed,
    remaining, requested, fits, retry_after``.
    """

    def __init__(self, denial: Denial) -> None:
        super().__init__(denial)
        self.denial = denial
        self.explanation = ""
        """The origin of an amount that the caller did not set; it is appended to the message."""

    def __str__(self) -> str:
        return f"{self.denial.message}; {self.explanation}" if self.explanation else self.denial.message

    @property
    def budget(self) -> str:
        """Name of the budget that denies the request. If several deny it, this is the first in the given order."""
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
        """Sum of the charges for holds that expired before a settlement."""
        return self.denial.unconfirmed

    @property
    def remaining(self) -> Amount:
        """``max(0, limit - spent - held - unconfirmed)``."""
        return self.denial.remaining

    @property
    def requested(self) -> Amount:
        """The amount requested of this budget."""
        return self.denial.requested

    @property
    def fits(self) -> Amount:
        """The largest amount that this budget would have granted."""
        return self.denial.fits

    @property
    def retry_after(self) -> int | None:
        """Whole seconds, rounded up, until a retry may succeed; ``None`` if waiting cannot help."""
        return self.denial.retry_after


class HoldConflict(BudgetError):
    """The id is in use with other contents, or the hold was settled differently. Nothing was changed.

    ``state`` is the state of the hold with this id; ``None`` if the store did not send this state.
    ``released_by_operator`` is set if an extension or growth is refused because an operator has released the hold. The
    worker can still commit the cost of such a hold.
    """

    def __init__(self, message: str, *, state: HoldState | None = None, released_by_operator: bool = False) -> None:
        super().__init__(message)
        self.state = state
        self.released_by_operator = released_by_operator


class UnknownHold(BudgetError):
    """No hold has this id: it was never granted, or it was settled more than 24 h ago."""


class TooManyHolds(BudgetError):
    """The tenant has ``max_holds`` open and unconfirmed holds; nothing was written.

    ``retry_after`` is the number of seconds, rounded up, until the first open hold expires. It is ``None`` if no hold
    is open.
    """

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManyBudgets(BudgetError):
    """The tenant has ``max_budgets`` budgets in the store; nothing was written."""


class UnknownBudget(BudgetError, LookupError):
    """The limiter has no budget of this name."""


def unknown_budget(name: object, known: Collection[str], where: str = "this limiter") -> UnknownBudget:
    """Create the error for an unknown budget.

    The error's message lists the known names. If there are many, the message lists only the most similar names.
    """
    if not known:
        return UnknownBudget(f"unknown budget {shown(name)}; {where} has none")
    if len(known) <= _NAMES_SHOWN:
        return UnknownBudget(f"unknown budget {shown(name)}; {where} has: {', '.join(known)}")
    from bisect import bisect
    from difflib import get_close_matches

    # A comparison takes microseconds to milliseconds, so of many names only the neighbours in sort order are compared.
    text = str(name)[:128]
    names = sorted(known)
    first = max(0, bisect(names, text) - _NAMES_COMPARED // 2)
    close = get_close_matches(text, names[first : first + _NAMES_COMPARED], n=_NAMES_SHOWN)
    hint = f", the closest: {', '.join(close)}" if close else ""
    return UnknownBudget(f"unknown budget {shown(name)}; {where} has {len(known):,}{hint}")


class KeyConflict(BudgetError):
    """Another access key has this name, or the tenant has the maximum number of keys; nothing was written."""


class UnknownKey(BudgetError, LookupError):
    """No access key has this name."""


class UnknownPrice(BudgetError, LookupError):
    """A model has no price, so its calls cannot be kept below a cap."""


class StoreUnavailable(BudgetError):
    """The store did not reply within the timeout.

    ``ambiguous`` is set if the store may have executed the request although the reply was lost. A retry with the same
    id is safe.

    ``reached`` is set if the store is up but admits nothing now (it is under repair, read-only or loading), or if the
    request was never sent. In these cases, the outage policies ``allow`` and ``lease`` deny the request, too.
    """

    def __init__(self, message: str, *, ambiguous: bool = False, reached: bool = False) -> None:
        super().__init__(message)
        self.ambiguous = ambiguous
        self.reached = reached


class StoreError(StoreUnavailable):
    """The store replied with an error: nothing was admitted.

    ``fault`` is ``login`` if the store rejects the user or the password. It is ``protocol`` if the server is not a
    Redis server, or if only one of the server and the URL uses TLS. Otherwise it is empty.
    """

    def __init__(self, message: str, *, ambiguous: bool = False, fault: Literal["", "login", "protocol"] = "") -> None:
        super().__init__(message, ambiguous=ambiguous, reached=True)
        self.fault = fault


class InvalidArgument(BudgetError, ValueError):
    """A name, id or option is invalid; nothing was sent."""


class InvalidAmount(InvalidArgument):
    """An amount is not a finite number, is negative, is a fraction of a count, or is 2**53 units or more."""


class InvalidScope(InvalidArgument):
    """A field or value of a scope is invalid or missing, or gives a budget another name than the scope means.

    Nothing was granted: a budget is never left out because its name cannot be made.
    """


class DefinitionConflict(InvalidArgument):
    """The store has another unit, period, timezone or kind of the budget; nothing was written.

    The first reservation or record registers the definition of a budget in the store. ``ktrdr budget migrate NAME``,
    or :meth:`~ktrdr_budget.AsyncBudgetLimiter.migrate`, replaces this definition. Open holds can be settled in any
    case.

    ``registered`` describes the store's definition; ``configured`` describes the limiter's definition. Each is empty if
    it is unknown.
    """

    def __init__(self, message: str, *, registered: str = "", configured: str = "") -> None:
        super().__init__(message)
        self.registered = registered
        self.configured = configured


BudgetMismatch = DefinitionConflict
"""The former name of :class:`DefinitionConflict`."""


class UnmeteredCall(InvalidArgument):
    """The cost of a call of a guarded client has no upper bound, or would not be reported. Nothing was sent."""
