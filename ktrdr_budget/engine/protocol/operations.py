"""The operations of a batch. Each class renders the operation's request and parses the operation's reply.

The request of an operation consists of a head (a letter and fields), a text for each window, and a tail. The text of a
window follows the window's number in the batch, with a space before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, NamedTuple

from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.engine.protocol.codes import CommitMode, ExtendMode, ReleaseMode
from ktrdr_budget.engine.protocol.hold_record import (
    HoldRecord,
    label_words_of,
    owner_word,
    parse_record,
    scope_word,
    segments_of,
    split_scope,
    word,
)
from ktrdr_budget.engine.protocol.replies import (
    GRANTED,
    RETIRED,
    Extended,
    Outgrown,
    Replayed,
    Reply,
    Restored,
    Settled,
    parse_common,
    parse_settled,
)
from ktrdr_budget.engine.protocol.window import BatchWindows, Window

__all__ = [
    "LONGEST_HOLD_MS",
    "Commit",
    "CommitAmount",
    "Extend",
    "ExtendAmount",
    "Labels",
    "Numbers",
    "Operation",
    "RecordSpend",
    "Release",
    "ReplayLimit",
    "ReplayTotal",
    "Reserve",
    "Restore",
    "Retire",
    "SettleOnBehalf",
    "SettlingOperation",
]

LONGEST_HOLD_MS: Final = 86_400_000
_LASTING_MS: Final = 315_360_000_000
"""Ten years: how long the store keeps the record of an open hold if a window of the hold has no end."""
_FAST_UNITS_MAX: Final = 2**46
"""The fast path commits at most this many units, so that the sums of a whole batch stay exact."""

Numbers = Mapping[Window, str]
"""The number of each window in a batch, with a space before it."""


class Labels(NamedTuple):
    """Texts that the caller gives a hold."""

    owner: str = ""
    operation: str = ""
    trace_id: str = ""
    scope: str = ""
    """The scope, in the form of :func:`~.hold_record.join_scope`."""


class CommitAmount(NamedTuple):
    """The amount that one window of a hold commits, in whole units."""

    mode: CommitMode
    units: int


class ExtendAmount(NamedTuple):
    """Totals of one window of a hold, in whole units. The store never lowers a total."""

    accrued: int = 0
    reserved: int = 0
    expected: int | None = None
    """The total to which the growth adds. If the store has a larger total, the growth changes nothing."""


class Operation:
    """One operation on one hold, and the windows that it touches."""

    __slots__ = ("hold_id", "key", "uses_fast_path", "windows")

    letter: ClassVar[str]
    is_retire: ClassVar[bool] = False
    asks_for_money: bool = False
    """Whether the operation reserves or grows. The operations that may return money are executed before these."""

    def __init__(self, hold_id: str, key: str, windows: Sequence[Window]) -> None:
        self.hold_id = hold_id
        self.key = key
        self.windows = windows
        self.uses_fast_path = False
        """Whether ``lua/fast_path.lua`` may execute the operation. False after this script has declined it."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.hold_id} {', '.join(window.name for window in self.windows)}>"

    @property
    def is_urgent(self) -> bool:
        """Whether the operation is a heartbeat or report. Such operations are the first in a batch."""
        return False

    @property
    def is_fact(self) -> bool:
        """Whether the operation is a settlement or report. These are sent even if the caller is gone."""
        return True

    def render(self, numbers: Numbers) -> str:
        """Render the operation for its own script."""
        raise NotImplementedError

    def render_fast(self, numbers: Numbers) -> str:
        """Render the operation for the fast path."""
        raise NotImplementedError

    def parse(self, line: str) -> Reply:
        """Parse the reply to this operation."""
        return parse_common(line)

    def mark_resent(self) -> None:
        """Note that the store may have executed an earlier attempt whose reply was lost."""

    def same_as(self, other: Operation) -> bool:
        """Whether both operations request the same change."""
        numbers = BatchWindows()
        return self.render(numbers) == other.render(numbers)


class Reserve(Operation):
    """A reservation: hold an amount in every window, or in none.

    Args:
        parts: the windows, each with the whole units to hold.
        policy: a code of :data:`~.codes.POLICIES`.
        now_ms: the store's clock, as this replica estimates it.
        request: this request if the caller chose the id, else empty; see :attr:`~.hold_record.HoldRecord.request`.
    """

    __slots__ = ("_expires_ms", "_labels", "_segments", "parts", "policy", "request", "ttl_ms")
    letter = codes.RESERVE
    asks_for_money = True

    def __init__(
        self,
        hold_id: str,
        key: str,
        parts: Sequence[tuple[Window, int]],
        ttl_ms: int,
        policy: str,
        labels: Labels,
        now_ms: int,
        request: str = "",
    ) -> None:
        self.hold_id = hold_id
        self.key = key
        self.parts = parts
        self.ttl_ms = ttl_ms
        self.policy = policy
        self.request = request
        owner, operation, trace_id, scope = labels
        self._labels = (
            f"{owner_word(owner, request)} {word(operation)} {word(trace_id)} {scope_word(scope)}"
            if owner or operation or trace_id or scope
            else f"-!{request} - - -" if request
            else "- - - -"
        )  # fmt: skip
        windows: list[Window] = []
        segments, have_grants, expires_ms = "", True, 0
        for window, units in parts:
            windows.append(window)
            segments += f"{window.segment}{units},,"
            have_grants = have_grants and window.has_grants
            # An open hold's record lives as long as its windows: only the record says what to return to the windows.
            window_expires_ms = window.expires_ms or now_ms + _LASTING_MS
            if window_expires_ms > expires_ms:
                expires_ms = window_expires_ms
        self.windows = windows
        self.uses_fast_path = have_grants
        self._segments = segments
        self._expires_ms = expires_ms

    @property
    def is_fact(self) -> bool:
        return False

    def render(self, numbers: Numbers) -> str:
        text = f"R {self.hold_id} {self.ttl_ms} {self.policy} {self._expires_ms}"
        for window, units in self.parts:
            text += f"{numbers[window]}:{units}"
        return f"{text}\n{self._labels}{self._segments}"

    render_fast = render

    def parse(self, line: str) -> Reply:
        if line == codes.GRANTED:
            return GRANTED
        return Replayed(line[2:]) if line[0] == codes.REPLAYED else parse_common(line)

    def granted(self, now_us: int, deadline_ms: int) -> str:
        """Return the record that the store has written for the granted hold. Mark the windows as having grants.

        Args:
            now_us: when the store granted the hold.
        """
        if not self.uses_fast_path:
            for window in self.windows:
                window.has_grants = True
        return f"o {self.policy} {deadline_ms} {now_us} 0 {self._labels}{self._segments}"


class SettlingOperation(Operation):
    """An operation that commits, releases or restores a hold, or records spend without a hold."""

    __slots__ = ()

    @property
    def units(self) -> tuple[int, ...]:
        """The whole units that count as spent, for each window."""
        raise NotImplementedError

    @property
    def is_release(self) -> bool:
        """Whether the settlement returns the whole amount."""
        return False

    def parse(self, line: str) -> Reply:
        return parse_settled(line) if line[0] in (codes.DONE, codes.REPLAYED) else parse_common(line)

    def record(self, settled: Settled, known: str, now_ms: int) -> HoldRecord:
        """The hold's record as this settlement left it.

        Args:
            known: the text of the record before the settlement; empty if this replica does not have it.
            now_ms: when the store replied. This time is used only if ``known`` is empty.
        """
        raise NotImplementedError

    def record_text(self, settled: Settled, known: str, now_ms: int) -> str:
        """The text of the record after this settlement."""
        return self.record(settled, known, now_ms).render()

    def _record_before(self, known: str, reserved: Sequence[int], now_ms: int) -> HoldRecord:
        if known:
            return parse_record(known)
        segments = segments_of(zip(self.windows, reserved, strict=True))
        return HoldRecord(codes.OPEN, "c", now_ms, now_ms * 1000, 0, "", "", "", segments)


class Commit(SettlingOperation):
    """A commit: record what the work cost.

    Args:
        amounts: for each window an amount, and how the store determines the committed amount.
        remark: a text that is added to the operation in the ledger.
        trace_id: a new trace id for the hold, sent only with a remark.
        known: the text of the hold's record if it was read for this commit, else empty.
    """

    __slots__ = ("_fast", "_settled", "_settled_text", "amounts", "known", "remark", "trace_id")
    letter = codes.COMMIT

    def __init__(
        self,
        hold_id: str,
        key: str,
        windows: Sequence[Window],
        amounts: Sequence[CommitAmount],
        remark: str = "",
        trace_id: str = "",
        known: str = "",
    ) -> None:
        self.hold_id = hold_id
        self.key = key
        self.windows = windows
        self.uses_fast_path = False
        self.amounts = amounts
        self.remark = remark
        self.trace_id = trace_id
        self.known = known
        self._settled_text = ""

    @property
    def units(self) -> tuple[int, ...]:
        return tuple([amount.units for amount in self.amounts])

    def render(self, numbers: Numbers) -> str:
        text = f"D {self.hold_id}"
        if self.remark:
            text = f"{codes.COMMIT_WITH_REMARK} {self.hold_id} {word(self.remark)} {word(self.trace_id)}"
        for window, (mode, units) in zip(self.windows, self.amounts, strict=True):
            text += f"{numbers[window]}:{mode}{units}"
        return text

    def enable_fast_path(self, replica: str, record: str, reserved: Sequence[tuple[Window, int]]) -> None:
        """Prepare the request of the fast path. The hold must not have changed since its grant.

        Args:
            replica: the id of the replica that commits.
            record: the text of the hold's record.
            reserved: the windows of the hold, each with the whole units reserved.
        """
        head, *segments = record.split("|")
        settled_text = f"c{head[1:]}"
        texts: list[str] = []
        charges: list[int] = []
        overrun = False
        for (window, counted), (_, units), segment in zip(reserved, self.amounts, segments, strict=True):
            if units > _FAST_UNITS_MAX or counted > _FAST_UNITS_MAX:
                return
            if window.flag == codes.SLOTS:
                units, text = 0, f":{counted}:"
            elif units > counted:
                overrun, text = True, f":{counted}:{units}o"
            else:
                text = f":{counted}:{units}"
            texts.append(text)
            charges.append(units)
            settled_text += f"|{segment}{units}"
        self.uses_fast_path = True
        self._settled_text = settled_text
        self._settled = Settled(tuple(charges), False, overrun)
        self._fast = label_words_of(head), texts, f"\n{record}\n{settled_text} {replica}"

    def render_fast(self, numbers: Numbers) -> str:
        label_words, texts, tail = self._fast
        line = f"C {self.hold_id} {label_words}"
        for window, text in zip(self.windows, texts, strict=True):
            line += numbers[window] + text
        return line + tail

    def parse(self, line: str) -> Reply:
        if line == codes.DONE:  # the fast path's
            return self._settled
        self._settled_text = ""
        return super().parse(line)

    def record(self, settled: Settled, known: str, now_ms: int) -> HoldRecord:
        before = self._record_before(self.known or known, settled.units, now_ms)
        return before.settled(codes.COMMITTED, settled.units, remark=self.remark, trace_id=self.trace_id)

    def record_text(self, settled: Settled, known: str, now_ms: int) -> str:
        return self._settled_text or super().record_text(settled, known, now_ms)


class Release(SettlingOperation):
    """A release: return the whole amount.

    Args:
        request: for ``ReleaseMode.UNRECEIVED``, the name of the request whose grant is released; else empty.
        known: the text of the hold's record if it was read for this release, else empty.
    """

    __slots__ = ("known", "mode", "request")
    letter = codes.RELEASE

    def __init__(
        self,
        hold_id: str,
        key: str,
        windows: Sequence[Window],
        mode: ReleaseMode = ReleaseMode.BY_WORKER,
        *,
        request: str = "",
        known: str = "",
    ) -> None:
        super().__init__(hold_id, key, windows)
        self.mode = mode
        self.request = request
        self.known = known

    @property
    def units(self) -> tuple[int, ...]:
        return (0,) * len(self.windows)

    @property
    def is_release(self) -> bool:
        return True

    def render(self, numbers: Numbers) -> str:
        return f"L {self.hold_id} {self.mode}{self.request}" + "".join([f"{numbers[w]}:x0" for w in self.windows])

    def is_correctable(self, settled: Settled) -> bool:
        """Whether the worker's later commit can still correct this release, as far as the reply shows.

        The release of an open hold by id is final, so the result is false. The reply to a repeated release by id does
        not show whether the first release was final; the result is then true.
        """
        if self.mode is ReleaseMode.BY_ID:
            return settled.late or settled.replayed
        return self.mode in (ReleaseMode.BY_OPERATOR, ReleaseMode.UNRECEIVED)

    def record(self, settled: Settled, known: str, now_ms: int) -> HoldRecord:
        state = codes.RELEASED_BY_OPERATOR if self.is_correctable(settled) else codes.RELEASED
        nothing = (0,) * len(self.windows)
        record = self._record_before(self.known or known, nothing, now_ms)
        record = record.settled(state, (0,) * len(record.segments))
        if self.mode is ReleaseMode.UNRECEIVED:
            record = record._replace(request=self.request, unreceived=True)
        return record


class RecordSpend(SettlingOperation):
    """A record of spend that was not reserved.

    Args:
        parts: the windows, each with the whole units spent.
        scope: the scope, in the form of :func:`~.hold_record.join_scope`.
        digest: a digest of this request if the caller chose the id, else empty.
        is_late: whether the store accepts windows that have ended or not begun.
    """

    __slots__ = ("digest", "is_late", "operation", "parts", "scope", "trace_id")
    letter = codes.RECORD

    def __init__(
        self,
        hold_id: str,
        key: str,
        parts: Sequence[tuple[Window, int]],
        *,
        operation: str = "",
        trace_id: str = "",
        scope: str = "",
        digest: str = "",
        is_late: bool = False,
    ) -> None:
        super().__init__(hold_id, key, [window for window, _ in parts])
        self.parts = parts
        self.operation = operation
        self.trace_id = trace_id
        self.scope = scope
        self.digest = digest
        self.is_late = is_late

    @property
    def units(self) -> tuple[int, ...]:
        return tuple([units for _, units in self.parts])

    @property
    def _request(self) -> str:
        return f"{self.digest}." if self.digest else ""

    def as_late(self) -> RecordSpend:
        """The same operation with ``is_late``, so that the spend counts in its windows even if they have ended."""
        labels = {"operation": self.operation, "trace_id": self.trace_id, "scope": self.scope, "digest": self.digest}
        return self if self.is_late else RecordSpend(self.hold_id, self.key, self.parts, is_late=True, **labels)

    def render(self, numbers: Numbers) -> str:
        owner = owner_word("", self._request)
        labels = f"{owner} {word(self.operation)} {word(self.trace_id)} {scope_word(self.scope)}"
        head = f"N {self.hold_id} {self.is_late:d} {labels}"
        return head + "".join([f"{numbers[window]}:{units}" for window, units in self.parts])

    def record(self, settled: Settled, known: str, now_ms: int) -> HoldRecord:
        segments = tuple(segment._replace(charged=segment.reserved) for segment in segments_of(self.parts))
        times, labels = (now_ms, now_ms * 1000, 0), ("", self.operation, self.trace_id)
        scope, units = split_scope(self.scope)
        return HoldRecord(
            codes.RECORDED, "c", *times, *labels, segments, request=self._request, scope=scope, units=units
        )


class Restore(SettlingOperation):
    """The replay of an open or settled hold to a store that has lost the hold or has an older state of the hold."""

    __slots__ = ("text",)
    letter = codes.RESTORE

    def __init__(self, hold_id: str, key: str, windows: Sequence[Window], text: str) -> None:
        super().__init__(hold_id, key, windows)
        self.text = text

    @property
    def units(self) -> tuple[int, ...]:
        return tuple([segment.charged for segment in parse_record(self.text).segments])

    def render(self, numbers: Numbers) -> str:
        return f"K {self.hold_id}" + "".join([f"{numbers[window]}:" for window in self.windows]) + f"\n{self.text}"

    def parse(self, line: str) -> Reply:
        if line == codes.GRANTED:
            return Restored(True)
        return Restored(False) if line == codes.REPLAYED else super().parse(line)

    def record(self, settled: Settled, known: str, now_ms: int) -> HoldRecord:
        return parse_record(self.text)

    def record_text(self, settled: Settled, known: str, now_ms: int) -> str:
        return self.text


class SettleOnBehalf(SettlingOperation):
    """The replay of another replica's settlement. The settlement counts in the subtotals of that replica."""

    __slots__ = ("replica", "settlement")
    letter = codes.SETTLE_ON_BEHALF

    def __init__(self, replica: str, settlement: SettlingOperation) -> None:
        super().__init__(settlement.hold_id, settlement.key, settlement.windows)
        self.replica = replica
        self.settlement = settlement

    @property
    def units(self) -> tuple[int, ...]:
        return self.settlement.units

    def render(self, numbers: Numbers) -> str:
        return f"S {self.replica} {self.settlement.render(numbers)}"

    def parse(self, line: str) -> Reply:
        if line == codes.OUTGROWN:  # that replica has replayed its subtotal itself
            return Restored(False)
        return self.settlement.parse(line)


class Extend(Operation):
    """A heartbeat, a growth, or a report of use. Amounts are totals so far, and the store never lowers a total."""

    __slots__ = ("amounts", "asks_for_money", "mode", "ttl_ms", "was_resent")
    letter = codes.EXTEND

    def __init__(
        self,
        hold_id: str,
        key: str,
        windows: Sequence[Window],
        amounts: Sequence[ExtendAmount],
        ttl_ms: int,
        mode: ExtendMode,
    ) -> None:
        super().__init__(hold_id, key, windows)
        self.amounts = amounts
        self.asks_for_money = any(amount.reserved for amount in amounts)
        self.ttl_ms = ttl_ms
        self.mode = mode
        self.was_resent = False
        """Whether the store may have executed an earlier attempt whose reply was lost."""

    @property
    def is_urgent(self) -> bool:
        return not self.asks_for_money

    @property
    def is_fact(self) -> bool:
        return any(amount.accrued for amount in self.amounts)

    def mark_resent(self) -> None:
        self.was_resent = True

    def as_report(self) -> Extend:
        """A report of the same totals, which leaves the deadline unchanged."""
        return Extend(self.hold_id, self.key, self.windows, self.amounts, self.ttl_ms, ExtendMode.REPORT)

    def render(self, numbers: Numbers) -> str:
        text = f"E {self.hold_id} {self.ttl_ms} {self.mode}"
        for window, (accrued, reserved, expected) in zip(self.windows, self.amounts, strict=True):
            text += f"{numbers[window]}:{accrued}:{reserved}"
            if expected is not None:
                text += f":{expected}"
        return text

    def parse(self, line: str) -> Reply:
        if line[0] == codes.EXTENDED:
            return Extended(line[2:])
        return Outgrown(line[2:]) if line[0] == codes.OUTGROWN else parse_common(line)


class Retire(Operation):
    """The retirement of a due hold: an open hold whose deadline has passed becomes unconfirmed."""

    __slots__ = ()
    letter = codes.RETIRE
    is_retire = True

    @classmethod
    def nothing(cls, key: str) -> Retire:
        """An operation that changes nothing, because its hold does not exist. It is sent to probe the store."""
        return cls("-", key, ())

    def render(self, numbers: Numbers) -> str:
        return f"X {self.hold_id}" + "".join([numbers[window] for window in self.windows])

    def parse(self, line: str) -> Reply:
        return RETIRED if line == codes.RETIRED else parse_common(line)


class ReplayTotal(Operation):
    """The replay of this replica's subtotal of a window. The store raises its own subtotal to this value."""

    __slots__ = ("units",)
    letter = codes.REPLAY_TOTAL

    def __init__(self, key: str, window: Window, units: int) -> None:
        super().__init__("-", key, (window,))
        self.units = units

    def render(self, numbers: Numbers) -> str:
        return f"T -{numbers[self.windows[0]]}:{self.units}"

    def parse(self, line: str) -> Reply:
        return parse_settled(line) if line[0] == codes.DONE else parse_common(line)


class ReplayLimit(Operation):
    """The replay of a limit that was set or cleared at run time, with the time of the change.

    Args:
        limit: the limit in whole units; ``None``: uncapped.
        until_ms: the end of the limit; 0: the limit has no end; 1: the limit was cleared.
    """

    __slots__ = ("budget", "changed_us", "definition", "limit", "until_ms")
    letter = codes.REPLAY_LIMIT

    def __init__(
        self, key: str, budget: str, limit: int | None, until_ms: int, changed_us: int, definition: str
    ) -> None:
        super().__init__("-", key, ())
        self.budget = budget
        self.limit = limit
        self.until_ms = until_ms
        self.changed_us = changed_us
        self.definition = definition

    def render(self, numbers: Numbers) -> str:
        limit = "-" if self.limit is None else str(self.limit)
        return f"Q - {self.budget} {limit} {self.until_ms} {self.changed_us} {self.definition}"

    def parse(self, line: str) -> Reply:
        if line in (codes.GRANTED, codes.REPLAYED):
            return Restored(line == codes.GRANTED)
        return parse_common(line)
