"""The state of one replica for one tenant: its budgets, the store's clock, and acknowledged operations."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Sequence

from ktrdr_budget.engine.protocol.batch import BatchHead, Header, Settings
from ktrdr_budget.engine.protocol.codes import COUNT
from ktrdr_budget.engine.protocol.keys import Keys, public_window, stored_window
from ktrdr_budget.engine.protocol.operations import LONGEST_HOLD_MS, SettlingOperation
from ktrdr_budget.engine.protocol.replies import Settled
from ktrdr_budget.engine.protocol.requests import ReadHead
from ktrdr_budget.engine.protocol.window import Window, flag_of
from ktrdr_budget.engine.replica.journal import Journal
from ktrdr_budget.errors import InvalidArgument, shown, unknown_budget
from ktrdr_budget.models import Budget, check_name
from ktrdr_budget.periods import PERIODS, Span, window_at, window_named

__all__ = ["MAX_BUDGETS", "MAX_HOLDS", "RETENTION_DAYS", "RETENTION_DAYS_MIN", "ReplicaState"]

MAX_HOLDS = 1_000_000
RETENTION_DAYS = 35
RETENTION_DAYS_MIN = 2
"""With a shorter retention, the store would drop a window whose last holds can still be settled."""
_RETENTION_DAYS_MAX = 3650
MAX_BUDGETS = 1_000
_CACHED_WINDOWS = 1024
_FORGOTTEN_AFTER_MS = LONGEST_HOLD_MS
SLOW_BATCH_EVERY_S = 1.0
"""At this interval, a batch goes through the full script, not the fast path. Only the full script finds holds that are
past their deadline, and records that this replica is alive."""
SLOW_BATCHES_AFTER_MISS = 8


class ReplicaState:
    """One replica's state for one tenant. It does no I/O; the caller passes replies to :meth:`absorb`.

    Args:
        retention_days: days for which the store keeps a window and its ledger after the last hold could have ended.
        id_memory_ms: how long the store keeps the id of a hold after its settlement.
        ledger_entries_max: if a ledger has more entries, one summary replaces the oldest of them.
        max_holds: how many holds, open and unconfirmed, the tenant may have.
        max_budgets: how many budgets the tenant may have.
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
        self.max_holds = _whole_number(max_holds, "max_holds", 999_999_999_999)
        self.max_budgets = _whole_number(max_budgets, "max_budgets", 1_000_000)
        retention_ms = 86_400_000 * _whole_number(
            retention_days, "retention_days", _RETENTION_DAYS_MAX, least=RETENTION_DAYS_MIN
        )
        self.settings = Settings(id_memory_ms, retention_ms, ledger_entries_max, self.max_budgets, self.max_holds)
        self.budgets: dict[str, Budget] = {}
        for budget in _check_budgets(budgets):
            if budget.name in self.budgets:
                raise InvalidArgument(f"budget {budget.name!r} is given twice")
            self.budgets[budget.name] = budget
        if len(self.budgets) > self.max_budgets:
            raise InvalidArgument(f"{len(self.budgets)} budgets are given; max_budgets is {self.max_budgets}")
        self.losses = 0
        """How often this replica detected a data loss."""
        self.on_loss: Callable[[], None] | None = None
        """Called when a data loss is detected."""
        self.on_suspicion: Callable[[], None] | None = None
        """Called when a read's reply suggests a data loss."""
        self.on_late_reply: Callable[[], None] | None = None
        """Called if a reply from before a data loss arrives after its detection. The writes in that reply are lost."""
        self.policy_checked = False
        """Whether the store's eviction policy was read, or is being read."""
        self.renew()

    def renew(self) -> None:
        """Become a new replica: at the start, and in the child after a fork."""
        self.replica_id = secrets.token_hex(6)
        self.journal = Journal(self.replica_id)
        self.epoch: str | None = None
        """The store's epoch; ``None`` if this replica has not seen one."""
        self._proposed_epoch = secrets.token_hex(16)
        self.acknowledged = 0
        """How many writes of this replica the store has acknowledged."""
        self._last_reply_ms = 0.0
        self._started_monotonic_s = time.monotonic()
        self._started_us: int | None = None
        """The start of this replica by the store's clock; ``None`` before the store's first reply.

        This machine's clock may be wrong by hours.
        """
        self._offset_ms = time.time() * 1000 - time.monotonic() * 1000
        self._serial = itertools.count(1)
        self._slow_batches = 0
        self._next_slow_batch_s = 0.0
        self._current: dict[str, Window] = {}
        self._windows: dict[str, Window] = {}
        self._header: Header | None = None

    # -- identity ------------------------------------------------------------------------------------------------------

    def new_id(self) -> str:
        """An id that no other replica makes."""
        return f"{self.replica_id}-{next(self._serial)}"

    @property
    def header(self) -> Header:
        """The header of the next batch."""
        if self.acknowledged and self.silent_s * 1000 > _FORGOTTEN_AFTER_MS:
            # The store drops a replica that is silent for two days, and adds the subtotals of the replica to those of
            # others. After that, the replica's journal and count of writes no longer show a loss.
            self.acknowledged, self.epoch, self._header = 0, None, None
            self.journal.clear()
        if self._header is None:
            header = Header(
                self.replica_id,
                self.epoch,
                self.acknowledged,
                started_us=self._started_us,
                age_us=self.age_us(),
                proposed_epoch=self._proposed_epoch,
                settings=self.settings,
            )
            if self._started_us is None:
                return header  # not cached: the age of the replica grows
            self._header = header
        return self._header

    @property
    def claim(self) -> tuple[int, str]:
        """The start of this replica by the store's clock, and the replica's id.

        Of several replicas, the limit of the replica with the largest claim applies.
        """
        return self._started_us or 0, self.replica_id

    def age_us(self) -> int:
        """How long ago this replica started."""
        return int((time.monotonic() - self._started_monotonic_s) * 1e6)

    # -- the fast path -------------------------------------------------------------------------------------------------

    def use_fast_path(self) -> bool:
        """Whether the next batch may take the fast path: a script that executes only the most frequent operations."""
        if self._slow_batches > 0:
            self._slow_batches -= 1
            return False
        now_s = time.monotonic()
        if now_s >= self._next_slow_batch_s:
            self._next_slow_batch_s = now_s + SLOW_BATCH_EVERY_S
            return False
        return True

    def fast_path_missed(self) -> None:
        """Avoid the fast path for the next batches, because it could not execute this one.

        The cause, such as an exhausted budget, usually persists.
        """
        self._slow_batches = SLOW_BATCHES_AFTER_MISS

    # -- the store's clock ---------------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        """The store's clock, extrapolated from its last reply."""
        return int(time.monotonic() * 1000 + self._offset_ms)

    def set_clock(self, now_us: int, age_us: int) -> None:
        """Set the store's clock from a reply.

        The first reply also sets this replica's start by the store's clock. The estimate is between the real start and
        the reply. So a replica that is made after another replica's first reply always has the later start.

        Once the store's clock is behind the start, the clock was set back. The start is then set to the clock's time.

        Args:
            age_us: the age of this replica when it sent the request.
        """
        self._offset_ms = now_us / 1000 - time.monotonic() * 1000
        if self._started_us is None or self._started_us > now_us:
            self._started_us = now_us - age_us if self._started_us is None else now_us
            self._header = None

    def _set_clock(self, now_us: int, sent: Header) -> None:
        self.set_clock(now_us, sent.age_us if sent.started_us is None else 0)

    # -- data loss -----------------------------------------------------------------------------------------------------

    def absorb(self, head: BatchHead, sent: Header) -> None:
        """Update the state from the head of a batch's reply; detect data loss (P13)."""
        self._set_clock(head.now_us, sent)
        self._last_reply_ms = time.monotonic() * 1000
        if head.data_loss:
            if sent is self._header:  # else another lane sent the batch before the loss was detected
                self._lose(head.epoch, head.acknowledged)
            return
        timeline = head.epoch or sent.epoch
        if self.epoch not in (None, timeline):
            # A reply from before the loss. (Without an epoch, nothing was ever written.)
            if timeline is not None and self.on_late_reply is not None:
                self.on_late_reply()
            return
        if head.epoch or head.acknowledged > self.acknowledged:
            if head.epoch:
                self._set_epoch(head.epoch)
            self.acknowledged = max(head.acknowledged, self.acknowledged)
            self._header = None

    def _set_epoch(self, epoch: str | None) -> None:
        self.epoch = epoch
        # No two timelines of a store may ever have the same epoch.
        self._proposed_epoch = secrets.token_hex(16)
        self._header = None

    @property
    def last_reply_s(self) -> float:
        """When the store last replied to a batch, in seconds of the monotonic clock; 0 if it has not."""
        return self._last_reply_ms / 1000

    @property
    def silent_s(self) -> float:
        """Seconds since the last reply."""
        return time.monotonic() - self.last_reply_s

    def confirms_timeline(self, head: ReadHead, sent: Header) -> bool:
        """Whether the reply to a read has the epoch that this replica has seen; if not, there may be a data loss (P13).

        The method also sets the clock and, if no epoch was seen before, the epoch. So a replica that only reads detects
        losses, too.
        """
        self._set_clock(head.now_us, sent)
        if self.epoch is None and head.epoch is not None:
            self._set_epoch(head.epoch)
        if head.epoch == self.epoch and head.acknowledged >= sent.acknowledged:
            return True
        # If the epoch has changed since the request, the reply is only older than the reply to a batch.
        if sent.epoch == self.epoch and self.on_suspicion is not None:
            self.on_suspicion()
        return False

    def _lose(self, epoch: str | None, acknowledged: int) -> None:
        self.losses += 1
        self.acknowledged = acknowledged
        self._set_epoch(epoch)
        if self.on_loss is not None:
            self.on_loss()

    def journal_settlement(self, op: SettlingOperation, settled: Settled, now_ms: int) -> None:
        """Journal an acknowledged settlement."""
        self.journal.settled(op, settled, now_ms, self.windows_of(op, settled))

    def windows_of(self, op: SettlingOperation, settled: Settled) -> Sequence[Window]:
        """The windows in which a settlement counts, each for its units in the reply.

        If the store had executed an earlier attempt of a record of spend, the amount counts in that attempt's windows.
        """
        if not settled.windows:
            return op.windows
        flags = {window.budget: window.flag for window in op.windows}
        return [self.window(budget, stored, flags.get(budget, COUNT)) for budget, stored in settled.windows]

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
        """The budget's current window."""
        window = self._current.get(name)
        if window is not None:
            end_ms = window.span.end_ms
            if end_ms is None or window.span.start_ms <= time.monotonic() * 1000 + self._offset_ms < end_ms:
                return window
        budget = self.budget(name)
        window = self._window(budget, window_at(budget.period, budget.timezone, self.now_ms()))
        self._current[name] = window
        return window

    def window(self, name: str, stored: str, flag: str = COUNT) -> Window:
        """The window with this name in the store; the budget may be unknown to this replica, or defined differently."""
        budget, period_name = self.budgets.get(name), public_window(stored)
        if budget is not None and stored == stored_window(period_name, budget.definition):
            return self._window(budget, window_named(budget.period, budget.timezone, period_name))
        span = _guess_span(period_name)
        return Window(self.keys, name, span, flag, expires_ms=self._expires_ms(span), stored=stored)

    def _window(self, budget: Budget, span: Span) -> Window:
        key = f"{budget.name}:{span.name}"
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= _CACHED_WINDOWS:
                self._windows.clear()
            window = self._windows[key] = Window(
                self.keys,
                budget.name,
                span,
                flag_of(budget),
                definition=budget.definition,
                expires_ms=self._expires_ms(span),
                limit=budget.limit_units,
                asserts_limit=True,
            )
        return window

    def _expires_ms(self, span: Span) -> int:
        return 0 if span.end_ms is None else span.end_ms + LONGEST_HOLD_MS + self.settings.retention_ms


def _check_budgets(budgets: Iterable[Budget]) -> list[Budget]:
    given: list[Budget] = list(budgets) if isinstance(budgets, Iterable) else [None]
    for budget in given:
        if not isinstance(budget, Budget):
            raise InvalidArgument(f"budgets are given as a list of Budget, not as {shown(budgets)}")
        if budget.applies_to_scopes or budget.has_windows or budget.retention is not None:
            raise InvalidArgument(
                f"budget {budget.name!r}: placeholders, windows, when and retention are not served yet"
            )
    return given


def _whole_number(value: object, option: str, most: int, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidArgument(f"{option} must be a whole number from {least} to {most}, not {shown(value)}")
    return value


def _guess_span(window_name: str) -> Span:
    """The bounds of a window with an unknown timezone: the bounds in UTC, widened by a day on both sides.

    A day is more than the offset of any timezone.
    """
    for period in PERIODS:
        try:
            span = window_named(period, "UTC", window_name)
        except InvalidArgument:
            continue
        if span.end_ms is None:
            return span
        return Span(window_name, span.start_ms - LONGEST_HOLD_MS, span.end_ms + LONGEST_HOLD_MS)
    return Span(window_name, 0, None)
