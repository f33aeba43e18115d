"""Budgets, and immutable views of the store's data.

Money is ``Decimal`` dollars, counts are ``int``, instants are aware UTC datetimes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Generic, Literal, TypeVar, get_args

from ktrdr_budget.errors import BudgetError, InvalidArgument, shown
from ktrdr_budget.money import Amount, AmountIn, format_amount, from_units, not_an_amount, to_units
from ktrdr_budget.periods import PERIODS, timezone_of

__all__ = [
    "AccessKey",
    "Budget",
    "Change",
    "Denial",
    "HoldView",
    "LedgerEntry",
    "Migration",
    "Page",
    "Rights",
    "Settlement",
    "Status",
    "Statuses",
    "check_name",
    "check_on_expiry",
    "check_ttl_ms",
    "check_unit",
    "identity_of",
    "split_name",
]

_NAME = re.compile(r"[A-Za-z0-9._:/@-]{1,128}", re.ASCII)
_UNIT = re.compile(r"[A-Za-z0-9._-]{1,32}", re.ASCII)
FIELD = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
"""The name of a field of a scope."""
_PLACEHOLDER = re.compile(rf"\{{({FIELD.pattern})\}}", re.ASCII)
_PATTERN = re.compile(r"[A-Za-z0-9._:/@*?!\[\]-]{1,128}", re.ASCII)
_RETENTION = re.compile(r"(\d{1,6})([hd])", re.ASCII)
_RETENTION_MIN = timedelta(hours=48)
_RETENTION_MAX = timedelta(days=3650)
TTL_MAX_S = 86_400
TTL_DEFAULT_S = 900

OnExpiry = Literal["charge", "accrued", "release"]
"""What an expired hold is charged: the whole reservation, the accrued amount, or nothing."""
HoldState = Literal["open", "unconfirmed", "committed", "released", "recorded"]
"""The state of a hold. ``unconfirmed``: it expired before a settlement. ``recorded``: spend without a reservation."""


Rights = Literal["read", "use", "admin"]
"""What an access key permits: to read; also to reserve, settle and record; everything."""


def check_name(value: object, what: str) -> str:
    """Return the value if it is a valid budget name, tenant or id.

    Raises:
        InvalidArgument: the value does not match ``[A-Za-z0-9._:/@-]{1,128}``.
    """
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise InvalidArgument(f"{what} must match [A-Za-z0-9._:/@-]{{1,128}}, not {shown(value)}")


def check_field(value: object) -> str:
    """Return the value if it is a valid name of a field of a scope.

    Raises:
        InvalidArgument: the value does not match ``[a-z][a-z0-9_]{0,31}``.
    """
    if isinstance(value, str) and FIELD.fullmatch(value):
        return value
    raise InvalidArgument(f"a field must match {FIELD.pattern}, not {shown(value)}")


def split_name(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the name of a budget at its placeholders: the literals, one more than fields, and the fields."""
    parts = _PLACEHOLDER.split(name)
    return tuple(parts[::2]), tuple(parts[1::2])


def check_budget_name(value: object) -> None:
    """Raise :class:`~ktrdr_budget.errors.InvalidArgument` if the value is no name of a budget or template.

    A segment of a name (the text between two ``/``) has at most one placeholder. So a name matches a template in at
    most one way.
    """
    if not isinstance(value, str) or "{" not in value or len(value) > 128:
        check_name(value, "budget name")
        return
    literals, fields = split_name(value)
    if literals != ("",) * len(literals) and not _NAME.fullmatch("".join(literals)):
        raise InvalidArgument(
            f"budget name must match [A-Za-z0-9._:/@-]{{1,128}}, with placeholders such as {{user}}, not {shown(value)}"
        )
    if len(set(fields)) < len(fields):
        raise InvalidArgument(f"a placeholder occurs once in a budget name, not as in {shown(value)}")
    if not all("/" in literal for literal in literals[1:-1]):
        raise InvalidArgument(f"two placeholders must have a '/' between them, not as in {shown(value)}")


def check_unit(value: object) -> str:
    """Return the value if it is a valid unit.

    Raises:
        InvalidArgument: the value does not match ``[A-Za-z0-9._-]{1,32}``.
    """
    if isinstance(value, str) and _UNIT.fullmatch(value):
        return value
    raise InvalidArgument(f"unit must match [A-Za-z0-9._-]{{1,32}}, not {shown(value)}")


def check_ttl_ms(ttl: object) -> int:
    """Convert a ttl (time to live) of 1 to 86400 seconds to milliseconds.

    Raises:
        InvalidArgument: the value is not a number in that range.
    """
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 1 <= ttl <= TTL_MAX_S:
        raise InvalidArgument(f"ttl must be 1 to {TTL_MAX_S} seconds, not {shown(ttl)}")
    return int(ttl * 1000)


def check_on_expiry(value: object) -> None:
    """Raise :class:`~ktrdr_budget.errors.InvalidArgument` if the value is no :data:`OnExpiry`."""
    if not isinstance(value, str) or value not in get_args(OnExpiry):
        raise InvalidArgument(f"on_expiry must be 'charge', 'accrued' or 'release', not {shown(value)}")


@dataclass(frozen=True, slots=True)
class Budget:
    """A named cap on the spend in each window, such as each day. For kind ``slots``, a cap on the open holds.

    Args:
        name: a text that matches ``[A-Za-z0-9._:/@-]{1,128}``. With placeholders, such as ``user:{user}``, it is a
            template: a budget for each value of the field. A placeholder stands for characters without ``/``, or with
            ``/`` where it ends the name. Two placeholders have a ``/`` between them.
        limit: dollars or a count. ``None``: no cap. ``0``: every request is denied. A mapping of periods to limits
            defines one budget for each period: ``{"day": "5.00", "month": "50.00"}`` for ``team`` defines ``team/day``
            and ``team/month``.
        unit: ``usd``, or the name of a count (``tokens``, ``requests``, …).
        period: the length of a window: ``hour``, ``day``, ``week`` (ISO), ``month`` or ``ever``.
        timezone: the IANA name of the timezone in which a day, week or month begins.
        kind: ``spend``, or ``slots`` for a concurrency limit. Slots are held but never spent. So the period of slots is
            always ``ever``, and their unit is a count.
        when: the budget applies to each scope whose fields match these patterns of ``fnmatchcase``: a text or a list of
            texts for each field. ``{}``: it applies to every scope.
        retention: how long the store keeps an ended window: at least 48 hours, such as ``"48h"`` or ``"35d"``.
            ``None``: as the limiter says.

    Raises:
        InvalidArgument: a field is invalid (:class:`~ktrdr_budget.errors.InvalidAmount` for the limit).
    """

    name: str
    limit: AmountIn | Mapping[str, AmountIn | None] | None = field(hash=False)
    unit: str = "usd"
    period: str = "day"
    timezone: str = "UTC"
    kind: str = "spend"
    when: Mapping[str, str | Sequence[str]] | None = field(default=None, hash=False)
    retention: timedelta | str | None = None
    limit_units: int | None = field(init=False, repr=False, compare=False)
    """The limit in nano-dollars or counts; ``None`` if uncapped, or if there are several windows."""

    def __post_init__(self) -> None:
        check_budget_name(self.name)
        if self.kind not in ("spend", "slots"):
            raise InvalidArgument(f"kind must be 'spend' or 'slots', not {shown(self.kind)}")
        if self.kind == "slots":
            self._settle_slots()
        check_unit(self.unit)
        if self.period not in PERIODS:
            raise InvalidArgument(f"period must be one of {', '.join(PERIODS)}, not {shown(self.period)}")
        timezone_of(self.timezone)
        object.__setattr__(self, "when", _check_when(self.when))
        object.__setattr__(self, "retention", _check_retention(self.retention))
        if isinstance(self.limit, Mapping):
            self._settle_windows(self.limit)
            return
        units = None if self.limit is None else to_units(self.limit, self.unit, round_down=True)
        object.__setattr__(self, "limit_units", units)
        object.__setattr__(self, "limit", None if units is None else from_units(units, self.unit))

    def _settle_windows(self, limits: Mapping[str, AmountIn | None]) -> None:
        if not limits or self.kind == "slots" or self.period != "day":
            raise InvalidArgument(
                "a mapping of periods to limits must have an entry, and goes with neither a period nor kind 'slots';"
                f" not {shown(limits)} with period {shown(self.period)} and kind {shown(self.kind)}"
            )
        for limit in limits.values():
            if isinstance(limit, Mapping):
                raise not_an_amount(limit, self.unit)
        object.__setattr__(self, "limit_units", None)
        object.__setattr__(self, "limit", {window.period: window.limit for window in self.windows})

    def _settle_slots(self) -> None:
        # A slot taken before midnight is still taken after it, so slots have no shorter period.
        if self.period not in ("day", "ever"):
            raise InvalidArgument(f"a budget of kind 'slots' has period 'ever', not {shown(self.period)}")
        object.__setattr__(self, "period", "ever")
        if self.unit == "usd":
            object.__setattr__(self, "unit", "slots")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the placeholders in the name, in their order."""
        return split_name(self.name)[1]

    @property
    def is_template(self) -> bool:
        """Whether the name has placeholders."""
        return "{" in self.name

    @property
    def applies_to_scopes(self) -> bool:
        """Whether the budget applies to scopes by itself. If not, it applies only where it is named."""
        return self.is_template or self.when is not None

    @property
    def has_windows(self) -> bool:
        """Whether the limit is a mapping of periods, so that the name alone is not a budget."""
        return isinstance(self.limit, Mapping)

    @property
    def windows(self) -> tuple[Budget, ...]:
        """The budgets that this line defines: one for each period if the limit is a mapping, else the budget itself."""
        if not isinstance(self.limit, Mapping):
            return (self,)
        return tuple(
            replace(self, name=f"{self.name}/{period}", limit=limit, period=period)
            for period, limit in self.limit.items()
        )

    @property
    def definition(self) -> str:
        """Unit, period, timezone and kind in the store's format. All replicas must use the same definition."""
        return f"{self.unit},{self.period},{self.timezone},{self.kind}"

    @property
    def identity(self) -> str:
        """The definition in readable form: ``unit usd, period day, timezone UTC, kind spend``."""
        return identity_of(self.definition)


def _check_when(when: object) -> Mapping[str, tuple[str, ...]] | None:
    if when is None:
        return None
    if not isinstance(when, Mapping):
        raise InvalidArgument(f"when must be a mapping of fields to patterns, not {shown(when)}")
    checked = {}
    for name, given in when.items():
        patterns = (given,) if isinstance(given, str) else given
        if (
            not isinstance(patterns, Sequence)
            or not patterns
            or not all(isinstance(pattern, str) and _PATTERN.fullmatch(pattern) for pattern in patterns)
        ):
            raise InvalidArgument(
                f"when: {shown(name)} needs a pattern such as 'gpt-5-*', or a list of patterns, not {shown(given)}"
            )
        checked[check_field(name)] = tuple(patterns)
    return checked


def _check_retention(retention: object) -> timedelta | None:
    if retention is None:
        return None
    kept = retention
    if isinstance(retention, str) and (match := _RETENTION.fullmatch(retention)):
        number = int(match[1])
        kept = timedelta(hours=number) if match[2] == "h" else timedelta(days=number)
    if isinstance(kept, timedelta) and _RETENTION_MIN <= kept <= _RETENTION_MAX:
        return kept
    raise InvalidArgument(f"retention must be from 48h to 3650d, such as '48h' or '35d', not {shown(retention)}")


def identity_of(definition: str) -> str:
    """Format a definition as readable text. A definition in an unknown format is returned unchanged."""
    words = definition.split(",")
    if len(words) != len(_IDENTITY):
        return definition
    return ", ".join(f"{name} {word}" for name, word in zip(_IDENTITY, words, strict=True))


_IDENTITY = ("unit", "period", "timezone", "kind")


@dataclass(frozen=True, slots=True)
class Denial:
    """The reason and the figures of a denial."""

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
        """One line with the budget's name: ``agent: budget_exhausted ($0.10 remaining, need $0.15)``."""
        return f"{self.budget}: {self.summary}"

    @property
    def summary(self) -> str:
        """The message without the budget's name."""
        remaining, need = format_amount(self.remaining, self.unit), format_amount(self.requested, self.unit)
        return f"{self.reason} ({remaining} remaining, need {need})"


@dataclass(frozen=True, slots=True)
class Status:
    """The current window of a budget."""

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
    """Number of commits, of charges on expiry, and of spends recorded without a reservation."""
    overruns: int
    """Number of commits above their reservation."""
    limit_source: Literal["configured", "runtime"]
    limit_until: datetime | None
    """The end of a limit that was set with ``set_limit``; ``None`` if that limit has no end, or if none was set."""
    configured_limit: Amount | None
    as_of: datetime
    """The store's clock at the time of the reply."""
    recovering_until: datetime | None = None
    """The end of the repair after a data loss; ``None`` if there is no repair.

    During a repair, replicas replay their journals, and the store admits nothing.
    """

    @property
    def name(self) -> str:
        """The budget's name."""
        return self.budget

    @property
    def remaining(self) -> Amount | None:
        """``max(0, limit - spent - held - unconfirmed)``; ``None`` without a cap."""
        if self.limit is None:
            return None
        left = self.limit - self.spent - self.held - self.unconfirmed
        return max(left, type(left)(0)) if left > 0 else from_units(0, self.unit)


@dataclass(frozen=True, slots=True)
class HoldView:
    """The record of a hold in the store."""

    id: str
    state: HoldState
    amounts: Mapping[str, Amount]
    """Reserved amounts per budget. For spend that was recorded without a reservation, the recorded amounts."""
    accrued: Mapping[str, Amount]
    """Accrued amounts per budget."""
    charged: Mapping[str, Amount]
    """Charged amounts per budget. They count as spent if the hold was settled, and as unconfirmed if it expired."""
    windows: Mapping[str, str]
    """For each budget, the name of the window that admitted the hold and is charged for the hold."""
    units: Mapping[str, str]
    """Units per budget: ``usd``, ``count`` or ``slots``."""
    on_expiry: OnExpiry
    created_at: datetime
    expires_at: datetime
    owner: str
    operation: str
    trace_id: str
    released_by_operator: bool = False
    scope: Mapping[str, str] = field(default_factory=dict)
    """The fields of the scope in which the hold was reserved or recorded."""


@dataclass(slots=True)  # not frozen, which would make its creation four times as slow
class Settlement:
    """The result of a commit, release or record."""

    id: str
    state: HoldState
    amounts: Mapping[str, Amount]
    """Amounts that now count as spent; all 0 after a release."""
    replayed: bool = False
    """Whether the same settlement was made before, so that this call changed nothing."""
    overrun: bool = False
    """Whether the committed amount exceeds the reservation. The whole amount is recorded in any case."""
    overruns: tuple[str, ...] = field(default=(), compare=False)
    """The names of the budgets with an overrun."""
    late: bool = False
    """Whether the hold had already expired or been released by an operator. If so, the charge was corrected."""
    deferred: bool = False
    """Whether the settlement waits in memory until the store replies again (outage policy ``allow``)."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One entry in the ledger of a window. All entries of a window add up to ``spent + unconfirmed``."""

    entry_id: str
    """The entry's number in its ledger, from 1. Empty for an entry of kind ``carried``, which sums up the
    trimmed entries."""
    at: datetime
    """The entry's time by the store's clock. Entries are ordered by number, because that clock may be set back."""
    kind: Literal["commit", "record", "expiry", "correction", "release", "revival", "carried", "repair", "audit"]
    hold_id: str
    amount: Amount
    """The signed amount. It is negative if, for example, a correction lowers the charge of an expired hold."""
    operation: str
    trace_id: str
    scope: Mapping[str, str] = field(default_factory=dict)
    """The fields of the hold's scope."""


@dataclass(frozen=True, slots=True)
class Change:
    """An entry of the log of changes, which administrators make at run time."""

    number: int
    """The entry's number in the log, from 1."""
    at: datetime
    """When the change was made, by the store's clock."""
    kind: Literal["definition", "limit", "correction", "key"]
    name: str
    """The budget, or the access key."""
    by: str
    """Who made the change: the name of an access key, or the text that the caller gave."""
    before: str
    """What was in force before, such as ``$5.00 until 2026-11-24T00:00:00Z``; empty if nothing was."""
    after: str
    """What is in force now; empty if nothing is."""
    reason: str


@dataclass(frozen=True, slots=True)
class AccessKey:
    """An access key of the service, without its secret."""

    name: str
    scope: Mapping[str, str]
    """The scope of each request with the key; empty if it is not limited to one."""
    may_set: tuple[str, ...]
    """The further fields of a scope that a request with the key may set."""
    rights: Rights
    created_at: datetime
    expires_at: datetime | None
    """When the store removes the key; ``None`` if it stays until it is revoked."""


@dataclass(frozen=True, slots=True)
class Migration:
    """The previous and the current definition of a budget."""

    budget: str
    before: str | None
    """The previous definition, in the form of :attr:`Budget.identity`; ``None`` if none was registered."""
    after: str
    limit_cleared: bool = False
    """Whether a limit set with ``set_limit`` was cleared, because the budget's unit has changed."""


class Statuses(list[Status]):
    """A list of the statuses of budgets, and the errors of budgets whose figures are unknown."""

    def __init__(self, statuses: Iterable[Status] = (), unavailable: Mapping[str, BudgetError] | None = None) -> None:
        super().__init__(statuses)
        self.unavailable: Mapping[str, BudgetError] = unavailable or {}
        """The errors of budgets whose figures are unknown, by budget name."""


Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """One page of a list: its items, and the cursor of the next page (``None`` on the last page)."""

    items: tuple[Item, ...]
    next_cursor: str | None
    trimmed: bool = False
    """Whether the entries after the cursor were trimmed from the list. If so, this is the newest page instead."""

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]
