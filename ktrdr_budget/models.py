"""What the package speaks in: budgets, and frozen views of what the store knows.

Money is ``Decimal`` dollars, counts are ``int``, instants are aware UTC datetimes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, Literal, TypeVar, get_args

from ktrdr_budget.errors import BudgetError, InvalidArgument, shown
from ktrdr_budget.money import Amount, AmountIn, format_amount, from_units, to_units
from ktrdr_budget.periods import PERIODS, timezone_of

__all__ = [
    "Budget",
    "Denial",
    "HoldView",
    "LedgerEntry",
    "Migration",
    "Page",
    "Settlement",
    "Status",
    "Statuses",
    "check_name",
    "check_on_expiry",
    "check_ttl_ms",
    "identity_of",
]

_NAME = re.compile(r"[A-Za-z0-9._:/@-]{1,128}", re.ASCII)
_UNIT = re.compile(r"[A-Za-z0-9._-]{1,32}", re.ASCII)
TTL_MAX_S = 86_400
TTL_DEFAULT_S = 900

OnExpiry = Literal["charge", "accrued", "release"]
"""What an expired hold counts: all that was reserved, what was reported, or nothing."""
HoldState = Literal["open", "unconfirmed", "committed", "released", "recorded"]


def check_name(value: object, what: str) -> str:
    """A budget name, tenant or id, as it was given.

    Raises:
        InvalidArgument: it does not match ``[A-Za-z0-9._:/@-]{1,128}``.
    """
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise InvalidArgument(f"{what} must match [A-Za-z0-9._:/@-]{{1,128}}, not {shown(value)}")


def check_ttl_ms(ttl: object) -> int:
    """A time to live given in seconds, 1 to 86400, as milliseconds.

    Raises:
        InvalidArgument: not a number in that range.
    """
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 1 <= ttl <= TTL_MAX_S:
        raise InvalidArgument(f"ttl must be 1 to {TTL_MAX_S} seconds, not {shown(ttl)}")
    return int(ttl * 1000)


def check_on_expiry(value: object) -> None:
    """Raise :class:`~ktrdr_budget.errors.InvalidArgument` if it is no :data:`OnExpiry`."""
    if not isinstance(value, str) or value not in get_args(OnExpiry):
        raise InvalidArgument(f"on_expiry must be 'charge', 'accrued' or 'release', not {shown(value)}")


@dataclass(frozen=True, slots=True)
class Budget:
    """A named cap on what may be spent (or, for ``slots``, held) in each window of a period.

    Args:
        name: matches ``[A-Za-z0-9._:/@-]{1,128}``.
        limit: dollars or a count; ``None`` is uncapped, ``0`` denies all.
        unit: ``usd``, or the name of a count (``tokens``, ``requests``, …).
        period: ``hour``, ``day``, ``week`` (ISO), ``month`` or ``ever``.
        timezone: IANA name; decides when a day, week or month begins.
        kind: ``spend``, or ``slots`` for a concurrency limit: only ever held, so its period is ``ever`` and its unit
            a count, whatever the defaults say.

    Raises:
        InvalidArgument: a field is not usable (:class:`~ktrdr_budget.errors.InvalidAmount` for the limit).
    """

    name: str
    limit: AmountIn | None
    unit: str = "usd"
    period: str = "day"
    timezone: str = "UTC"
    kind: str = "spend"
    limit_units: int | None = field(init=False, repr=False, compare=False)
    """The limit in nano-dollars or counts; ``None`` if uncapped."""

    def __post_init__(self) -> None:
        check_name(self.name, "budget name")
        if self.kind not in ("spend", "slots"):
            raise InvalidArgument(f"kind must be 'spend' or 'slots', not {shown(self.kind)}")
        if self.kind == "slots":
            self._settle_slots()
        if not isinstance(self.unit, str) or not _UNIT.fullmatch(self.unit):
            raise InvalidArgument(f"unit must match [A-Za-z0-9._-]{{1,32}}, not {shown(self.unit)}")
        if self.period not in PERIODS:
            raise InvalidArgument(f"period must be one of {', '.join(PERIODS)}, not {shown(self.period)}")
        timezone_of(self.timezone)
        units = None if self.limit is None else to_units(self.limit, self.unit, round_down=True)
        object.__setattr__(self, "limit_units", units)
        object.__setattr__(self, "limit", None if units is None else from_units(units, self.unit))

    def _settle_slots(self) -> None:
        # A slot taken before midnight is still taken after it, so slots know no shorter period.
        if self.period not in ("day", "ever"):
            raise InvalidArgument(f"a budget of kind 'slots' has period 'ever', not {shown(self.period)}")
        object.__setattr__(self, "period", "ever")
        if self.unit == "usd":
            object.__setattr__(self, "unit", "slots")

    @property
    def definition(self) -> str:
        """The budget's identity, on which all replicas must agree, in the form the store keeps."""
        return f"{self.unit},{self.period},{self.timezone},{self.kind}"

    @property
    def identity(self) -> str:
        """The same in words: ``unit usd, period day, timezone UTC, kind spend``."""
        return identity_of(self.definition)


def identity_of(definition: str) -> str:
    """A definition as the store keeps it, in words; one that this version does not know stays as it is."""
    words = definition.split(",")
    if len(words) != len(_IDENTITY):
        return definition
    return ", ".join(f"{name} {word}" for name, word in zip(_IDENTITY, words, strict=True))


_IDENTITY = ("unit", "period", "timezone", "kind")


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a reservation was refused, and what would have fitted."""

    budget: str
    reason: str
    limit: Amount
    spent: Amount
    held: Amount
    unconfirmed: Amount
    remaining: Amount
    requested: Amount
    fits: Amount
    retry_after: int | None
    unit: str = "usd"

    @property
    def message(self) -> str:
        """One line for a person: ``budget_exhausted ($0.10 remaining, need $0.15)``, with the budget's name first."""
        return f"{self.budget}: {self.summary}"

    @property
    def summary(self) -> str:
        """The same without the name."""
        remaining, need = format_amount(self.remaining, self.unit), format_amount(self.requested, self.unit)
        return f"{self.reason} ({remaining} remaining, need {need})"


@dataclass(frozen=True, slots=True)
class Status:
    """One budget's window now, as the store knows it."""

    budget: str
    unit: str
    kind: str
    period: str
    timezone: str
    window: str
    starts_at: datetime | None
    resets_at: datetime | None
    limit: Amount | None
    spent: Amount
    held: Amount
    unconfirmed: Amount
    events: int
    """Commits, records and expiry charges so far."""
    overruns: int
    """Commits above their reservation."""
    limit_source: Literal["configured", "runtime"]
    limit_until: datetime | None
    """When a run-time limit ends; ``None`` if it does not, or if there is none."""
    configured_limit: Amount | None
    as_of: datetime
    """The store's clock when it answered."""
    recovering_until: datetime | None = None
    """Set after the store went back in time: until then replicas tell it what it has lost, and nothing is admitted."""

    @property
    def name(self) -> str:
        """The budget's name."""
        return self.budget

    @property
    def remaining(self) -> Amount | None:
        """``max(0, limit - spent - held - unconfirmed)``; ``None`` if uncapped."""
        if self.limit is None:
            return None
        left = self.limit - self.spent - self.held - self.unconfirmed
        return max(left, type(left)(0)) if left > 0 else from_units(0, self.unit)


@dataclass(frozen=True, slots=True)
class HoldView:
    """A hold as the store knows it: read by id, or listed."""

    id: str
    state: HoldState
    amounts: Mapping[str, Amount]
    """Reserved, per budget; for a recorded spend, what was recorded."""
    accrued: Mapping[str, Amount]
    """Reported so far, per budget."""
    charged: Mapping[str, Amount]
    """What counts as spent (settled) or as unconfirmed (expired), per budget."""
    windows: Mapping[str, str]
    """The window of each budget that admitted the hold, and pays."""
    units: Mapping[str, str]
    """``usd`` or ``count`` or ``slots`` per budget."""
    on_expiry: OnExpiry
    created_at: datetime
    expires_at: datetime
    owner: str
    operation: str
    trace_id: str
    released_by_operator: bool = False


@dataclass(slots=True)  # frozen, it would take four times as long to make
class Settlement:
    """What a commit, release or record did."""

    id: str
    state: HoldState
    amounts: Mapping[str, Amount]
    """What counts as spent now, per budget; all 0 after a release."""
    replayed: bool = False
    """The same settlement had been made before; nothing changed."""
    overrun: bool = False
    """More was committed than had been reserved; recorded in full all the same."""
    overruns: tuple[str, ...] = field(default=(), compare=False)
    """The budgets in which it was more."""
    late: bool = False
    """The hold had expired, or an operator had released it; this corrected it."""
    deferred: bool = False
    """The store is unreachable and policy is ``allow``: kept in memory, recorded when the store is back."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One signed line of a window's ledger; they add up to ``spent + unconfirmed``."""

    entry_id: str
    """The entry's number in its ledger, from 1; empty for the summary of trimmed entries, of kind ``carried``."""
    at: datetime
    kind: Literal["commit", "record", "expiry", "correction", "release", "revival", "carried", "repair", "audit"]
    hold_id: str
    amount: Amount
    """Signed: a correction of an expiry charge may be negative."""
    operation: str
    trace_id: str


@dataclass(frozen=True, slots=True)
class Migration:
    """Which definition of a budget was registered, and which one is now."""

    budget: str
    before: str | None
    """In words, as :attr:`Budget.identity`; ``None`` if none was registered."""
    after: str
    limit_cleared: bool = False
    """Whether a limit that was set at run time went, because it was an amount of another unit."""


class Statuses(list[Status]):
    """The budgets whose figures are known, and why those of the others are not."""

    def __init__(self, statuses: Iterable[Status] = (), unavailable: Mapping[str, BudgetError] | None = None) -> None:
        super().__init__(statuses)
        self.unavailable: Mapping[str, BudgetError] = unavailable or {}
        """By budget: its figures are unknown, for this reason."""


Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Some items, newest first, and where the next page begins (``None``: no more)."""

    items: tuple[Item, ...]
    next_cursor: str | None
    trimmed: bool = False
    """Whether the entries that the cursor of a ledger names were trimmed meanwhile, so that this page is the newest."""

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]
