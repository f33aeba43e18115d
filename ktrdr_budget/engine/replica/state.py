"""What one replica knows between requests: its budgets, the store's clock, and what the store has acknowledged."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from ktrdr_budget.engine.protocol import LONGEST_HOLD_MS, Head, Header, Op, Read, ReadHead, Window, flag_of
from ktrdr_budget.engine.protocol.keys import Keys, public_window, split_name, stored_window
from ktrdr_budget.engine.protocol.scripts import READ
from ktrdr_budget.engine.replica.journal import Memory
from ktrdr_budget.errors import InvalidArgument, shown, unknown_budget
from ktrdr_budget.models import Budget, check_name
from ktrdr_budget.periods import PERIODS, Span, window_at, window_named

__all__ = ["MAX_BUDGETS", "MAX_HOLDS", "RETENTION_DAYS", "RETENTION_DAYS_MIN", "Session"]

MAX_HOLDS = 1_000_000
RETENTION_DAYS = 35
RETENTION_DAYS_MIN = 2
"""Less than two days would forget a window while its last holds can still be settled and audited."""
_RETENTION_DAYS_MAX = 3650
MAX_BUDGETS = 1_000
_REMEMBERED_WINDOWS = 1024
_FORGET_AFTER_MS = LONGEST_HOLD_MS
_HOUSEKEEPING_S = 1.0
_DETOURS = 8
"""Batches that go the long way once one was not simple: it may be what is asked for, such as money that is gone."""


class Session:
    """The state of one replica towards one tenant. Does no I/O; the caller brings replies to :meth:`absorb`.

    Args:
        retention_days: how long windows and ledgers stay after the longest hold of the window could have ended.
        id_memory_ms: how long ids are remembered after settlement.
        ledger_entries_max: above this a ledger's oldest entries are carried forward into one.
        max_holds: how many holds, open and unconfirmed, the tenant may have.
        max_budgets: how many budgets it may have.
    """

    def __init__(
        self,
        tenant: str,
        budgets: Iterable[Budget],
        *,
        retention_days: int = RETENTION_DAYS,
        id_memory_ms: int = 86_400_000,
        ledger_entries_max: int = 1_000_000,
        max_holds: int = MAX_HOLDS,
        max_budgets: int = MAX_BUDGETS,
    ) -> None:
        self.tenant = check_name(tenant, "tenant")
        self.keys = Keys(tenant)
        self.retention_ms = 86_400_000 * _whole_number(
            retention_days, "retention_days", _RETENTION_DAYS_MAX, least=RETENTION_DAYS_MIN
        )
        self.id_memory_ms = id_memory_ms
        self.ledger_entries_max = ledger_entries_max
        self.max_holds = _whole_number(max_holds, "max_holds", 999_999_999_999)
        self.max_budgets = _whole_number(max_budgets, "max_budgets", 1_000_000)
        self.budgets: dict[str, Budget] = {}
        for budget in _all(budgets):
            if budget.name in self.budgets:
                raise InvalidArgument(f"budget {budget.name!r} is given twice")
            self.budgets[budget.name] = budget
        if len(self.budgets) > self.max_budgets:
            raise InvalidArgument(f"{len(self.budgets)} budgets are given; max_budgets is {self.max_budgets}")
        self.losses = 0
        """How often the store was seen to have gone back in time."""
        self.on_loss: Callable[[], None] | None = None
        self.on_suspicion: Callable[[], None] | None = None
        self.on_policy: Callable[[str], None] | None = None
        """Called with what is wrong with the store's eviction policy."""
        self.policy_watched = False
        """Whether that policy is known, or is being read."""
        self.on_late: Callable[[], None] | None = None
        """Told of an answer from before a loss that was noticed meanwhile: what it acknowledges is lost, too."""
        self.renew()

    def renew(self) -> None:
        """Becomes a new replica: at the start, and in the child after a fork."""
        self.replica_id = secrets.token_hex(6)
        self.memory = Memory(self.replica_id)
        self._epoch = "-"
        self._propose()
        self._acknowledged = 0
        self._heard_ms = 0.0
        self._started_monotonic = time.monotonic()
        self._started_us: int | None = None
        """By the store's clock; ``None`` before its first reply. This machine's own clock may be wrong by hours."""
        self._offset_ms = time.time() * 1000 - time.monotonic() * 1000
        self._serial = itertools.count(1)
        self._detours = 0
        self._housekeeping_s = 0.0
        self._current: dict[str, Window] = {}
        self._windows: dict[str, Window] = {}
        self._header: Header | None = None

    # -- identity ------------------------------------------------------------------------------------------------------

    def new_id(self) -> str:
        """An id that no other replica makes."""
        return f"{self.replica_id}-{next(self._serial)}"

    @property
    def header(self) -> Header:
        """What this replica says of itself."""
        if self._acknowledged and self.silent_s * 1000 > _FORGET_AFTER_MS:
            # The store forgets a replica that is silent for two days, and adds its subtotals to those of others: what
            # this one remembers is no measure of a loss any more.
            self._acknowledged, self._epoch, self._header = 0, "-", None
            self.memory.clear()
        if self._header is None:
            replica, memory_ms = self.replica_id, str(self.id_memory_ms)
            started = f"-{self.age_us()}" if self._started_us is None else str(self._started_us)
            header = Header(replica, self._epoch, str(self._acknowledged), started, self._settings, memory_ms)
            if self._started_us is None:
                return header  # the next one is older
            self._header = header
        return self._header

    @property
    def claim(self) -> tuple[int, str]:
        """When this replica started, by the store's clock, and its id: of two, the limit of the larger is in force."""
        return self._started_us or 0, self.replica_id

    def age_us(self) -> int:
        """How long ago this replica started."""
        return int((time.monotonic() - self._started_monotonic) * 1e6)

    # -- the way of a batch --------------------------------------------------------------------------------------------

    def goes_simply(self) -> bool:
        """Whether the next batch may go by ``fast_path.lua``; once a second one takes the way that keeps house."""
        if self._detours > 0:
            self._detours -= 1
            return False
        now = time.monotonic()
        if now >= self._housekeeping_s:
            self._housekeeping_s = now + _HOUSEKEEPING_S
            return False
        return True

    def was_not_simple(self) -> None:
        """What is as the last batch will not be simple either, for a while."""
        self._detours = _DETOURS

    # -- reads ---------------------------------------------------------------------------------------------------------

    def read(
        self,
        command: str,
        keys: Sequence[str],
        args: Sequence[str | int] = (),
        *,
        while_recovering: Literal["answers", "answers if found", "waits"] = "answers",
    ) -> Read:
        """One command that reads ``keys``, which come first in it; its reply is a list of one item."""
        return Read(READ, [self.keys.meta, *keys], [self.replica_id, command, *args], while_recovering)

    # -- the store's clock ---------------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        """The store's clock, as far as its last answer tells."""
        return int(time.monotonic() * 1000 + self._offset_ms)

    def set_clock(self, now_us: int, age_us: int) -> None:
        """Learns the store's clock from a reply; ``age_us``: of this replica, when it asked.

        So its start is never taken to be earlier than it was, nor later than that reply: a replica that is made after
        another one's first reply has started later than that. A start in the store's future is from before its clock
        was set back.
        """
        self._offset_ms = now_us / 1000 - time.monotonic() * 1000
        if self._started_us is None or self._started_us > now_us:
            self._started_us = now_us - age_us if self._started_us is None else now_us
            self._header = None

    # -- loss ----------------------------------------------------------------------------------------------------------

    def absorb(self, head: Head, sent: Header) -> None:
        """Learns from the head of a batch's reply, and notices a store that has gone back in time (P13)."""
        self.set_clock(head.now_us, -int(sent.started) if sent.started[0] == "-" else 0)
        self._heard_ms = time.monotonic() * 1000
        if head.went_back:
            if sent is self._header:  # else it answers what another lane sent before it knew
                self._lose(head.epoch, head.writes)
            return
        timeline = head.epoch or sent.epoch
        if self._epoch not in ("-", timeline):
            # What another lane was told before the loss is no longer so. (Without an epoch, nothing was ever written.)
            if timeline != "-" and self.on_late is not None:
                self.on_late()
            return
        if head.epoch or head.writes > self._acknowledged:
            if head.epoch:
                self._epoch = head.epoch
                self._propose()
            self._acknowledged = max(head.writes, self._acknowledged)
            self._header = None

    def _propose(self) -> None:
        """Another epoch for the next time that the store needs one: no two of its timelines may ever have the same."""
        # Bounds have a fixed width: the script cuts them out faster than it finds them.
        bounds = " ".join(f"{most:012d}" for most in (self.ledger_entries_max, self.max_budgets, self.max_holds))
        self._settings = f"{secrets.token_hex(16)} {self.id_memory_ms} {self.retention_ms} {bounds}"

    @property
    def epoch(self) -> str:
        """The store's epoch, as far as it is known; ``-`` if it is not."""
        return self._epoch

    @property
    def heard_s(self) -> float:
        """When the store last answered a batch, in seconds of the monotonic clock; 0 if it has not."""
        return self._heard_ms / 1000

    @property
    def silent_s(self) -> float:
        """For how long it has not."""
        return time.monotonic() - self.heard_s

    def believes(self, head: ReadHead, sent: Header) -> bool:
        """Whether a read's reply shows the timeline that this replica knows; if not, a loss is suspected (P13).

        Learns the clock, and the epoch if none was known: a replica that only reads notices losses, too.
        """
        self.set_clock(head.now_us, -int(sent.started) if sent.started[0] == "-" else 0)
        if self._epoch == "-" and head.epoch != "-":
            self._epoch = head.epoch
            self._propose()
            self._header = None
        if head.epoch == self._epoch and head.acknowledged >= int(sent.acknowledged):
            return True
        # Else the reply only is older than what a batch has brought meanwhile.
        if sent.epoch == self._epoch and self.on_suspicion is not None:
            self.on_suspicion()
        return False

    def _lose(self, epoch: str | None, writes: int) -> None:
        self.losses += 1
        self._epoch, self._acknowledged = epoch or "-", writes
        self._propose()
        self._header = None
        if self.on_loss is not None:
            self.on_loss()

    def settled(self, op: Op, line: str, now_ms: int) -> None:
        """Remembers a settlement that was acknowledged; a replay in the windows in which it was first recorded."""
        words = line.split(" ")
        if len(words) == 5:
            names = [split_name(name) for name in words[4].split(",")]
            parts = [
                (self.window(budget, name, window.flag), tail)
                for (window, tail), (budget, name) in zip(op.parts, names, strict=True)
            ]
            op = Op(op.id, op.key, op.head, parts)
        self.memory.acknowledged(op, line, now_ms)

    # -- windows -------------------------------------------------------------------------------------------------------

    def budget(self, name: str) -> Budget:
        """The configured budget of this name.

        Raises:
            UnknownBudget: there is none.
        """
        try:
            return self.budgets[name]
        except (KeyError, TypeError):
            check_name(name, "budget name")
            raise unknown_budget(name, self.budgets) from None

    def current_window(self, name: str) -> Window:
        """The budget's window now."""
        window = self._current.get(name)
        if window is not None:
            end_ms = window.span.end_ms
            if end_ms is None or window.span.start_ms <= time.monotonic() * 1000 + self._offset_ms < end_ms:
                return window
        budget = self.budget(name)
        window = self._window(budget, window_at(budget.period, budget.timezone, self.now_ms()))
        self._current[name] = window
        return window

    def window(self, name: str, stored: str, flag: str = "n") -> Window:
        """A window by its name in the store, also of a budget that this replica was not given, or defines otherwise."""
        budget, period_name = self.budgets.get(name), public_window(stored)
        if budget is not None and stored == stored_window(period_name, budget.definition):
            return self._window(budget, window_named(budget.period, budget.timezone, period_name))
        span = _guess_span(period_name)
        return Window(self.keys, name, span, flag, "-", self._expires_ms(span), "-", False, stored)

    def _window(self, budget: Budget, span: Span) -> Window:
        key = f"{budget.name}:{span.name}"
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= _REMEMBERED_WINDOWS:
                self._windows.clear()
            limit = "-" if budget.limit_units is None else str(budget.limit_units)
            expires_ms = self._expires_ms(span)
            window = Window(self.keys, budget.name, span, flag_of(budget), budget.definition, expires_ms, limit, True)
            self._windows[key] = window
        return window

    def _expires_ms(self, span: Span) -> int:
        return 0 if span.end_ms is None else span.end_ms + LONGEST_HOLD_MS + self.retention_ms


def _all(budgets: Iterable[Budget]) -> list[Budget]:
    given: list[Budget] = list(budgets) if isinstance(budgets, Iterable) else [None]
    for budget in given:
        if not isinstance(budget, Budget):
            raise InvalidArgument(f"budgets are given as a list of Budget, not as {shown(budgets)}")
    return given


def _whole_number(value: object, what: str, most: int, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidArgument(f"{what} must be a whole number from {least} to {most}, not {shown(value)}")
    return value


def _guess_span(window_name: str) -> Span:
    """The bounds of a window whose timezone is not known here: widened by a day, which is more than any timezone."""
    for period in PERIODS:
        try:
            span = window_named(period, "UTC", window_name)
        except InvalidArgument:
            continue
        if span.end_ms is None:
            return span
        return Span(window_name, span.start_ms - LONGEST_HOLD_MS, span.end_ms + LONGEST_HOLD_MS)
    return Span(window_name, 0, None)
