"""What a replica remembers of what the store acknowledged to it, so that a store that lost it can be told again (P13).

Four things, all by ids or times or as totals, so that telling them twice changes nothing: the *limits* of run time that
it has set or read, its own *share* of each window's spend, the *holds* that it was granted, and a bounded number of
recent *settlements*. A settlement that is remembered restores its id, too; one that is not is still in the share. A
settlement wins over an open hold. Both are kept as the record of the hold, so that a repair restores what was asked,
too, and the same reservation is a replay afterwards.

Each settlement is in one replica's share: that of the one whose request made it; the store's record names it. Another
one that was told of it (its own request was a replay) remembers it as well, and tells it on behalf of the first, which
may be gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from ktrdr_budget.engine.protocol import (
    LONGEST_HOLD_MS,
    SETTLED,
    Op,
    Record,
    Restore,
    SettleOnBehalf,
    Window,
    parse_record,
)

if TYPE_CHECKING:
    from ktrdr_budget.engine.protocol.keys import Keys
    from ktrdr_budget.models import Budget

__all__ = ["Memory", "Repair"]

SETTLEMENTS_MAX = 20_000
"""At most; at least half as many."""
HOLDS_MAX = 10_000
"""At most; at least half as many. Fewer than settlements: a hold that another replica has settled is not to be
remembered for longer than that."""
AGE_MAX_MS = LONGEST_HOLD_MS // 2
"""A settlement is told again only while the store cannot have forgotten its id, which it does a day after it."""
_FORGOTTEN_MS = 86_400_000
"""After it, the store has forgotten the id of a settlement, which may be used for another one."""
HOLD_AGE_MAX_MS = AGE_MAX_MS
"""A hold may have been settled elsewhere since the store was last seen to have it: it is not remembered for longer than
that settlement is."""
_FRESH_MS = 2000
"""Before that age, nobody asks whether a hold was settled elsewhere: most are settled here by then."""
_WINDOWS_MAX = 4096
_CLEARED = 1


class _Limit(NamedTuple):
    """A limit that was set at run time."""

    units: str
    """``-`` for uncapped."""
    until_ms: int
    """0 for good; ``_CLEARED`` of one that was cleared."""
    changed_us: int
    definition: str
    """The budget's: the limit is an amount of its unit."""


class _Held(NamedTuple):
    """Of texts only: the garbage collector need not look at them again and again."""

    windows: str
    """Their keys."""
    record: str
    """As the store has it."""
    seen_us: int
    """When the store was last seen to have it."""


class _Settled(NamedTuple):
    """The same of a settlement."""

    letter: str
    head: str
    """The operation's."""
    windows: str
    """Their keys."""
    line: str
    """The store's answer."""
    at_ms: int
    record: str
    """The hold's, before it was settled; empty if it is not known, or there was no hold."""

    @property
    def own(self) -> bool:
        """Whether it is in this replica's share."""
        return self.line[0] == "k"

    @property
    def units(self) -> list[str]:
        """What counts as spent in each window."""
        return self.line.split(" ")[2].split(",")


@dataclass
class Repair:
    """What was told again after a loss, and what could not be."""

    settlements: int = 0
    holds: int = 0
    windows: int = 0
    """Windows whose share was raised for settlements that are no longer remembered one by one."""
    forgotten_settlements: int = 0
    """Settlements whose ids are beyond the bounded memory; their spend is in the shares."""
    forgotten_holds: int = 0
    """Holds beyond it: what they held is free, unless the store still knew them."""

    def __bool__(self) -> bool:
        return bool(self.settlements or self.holds or self.windows)

    def __str__(self) -> str:
        return f"{self.settlements} settlements, {self.holds} open holds, older spend of {self.windows} windows"

    def add(self, other: Repair) -> None:
        """Adds what was told again after another loss."""
        for figure in fields(self):
            setattr(self, figure.name, getattr(self, figure.name) + getattr(other, figure.name))


class Memory:
    """Of one replica. Does no I/O. It is told of every call, so it only keeps what it is given."""

    def __init__(self, replica: str = "") -> None:
        self._replica = replica
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._windows: dict[str, Window] = {}
        """By their keys."""
        self._older: dict[str, int] = {}
        """Units in each window's share that are of settlements which are no longer remembered."""
        # Plain tuples, which cost a fraction of named ones to make; the order is that of _Held and _Settled. And two
        # generations of both: forgetting the older one at once costs nothing, one by one would cost a search each.
        self._holds: dict[str, tuple[Any, ...]] = {}
        self._holds_before: dict[str, tuple[Any, ...]] = {}
        self._settled: dict[str, tuple[Any, ...]] = {}
        self._settled_before: dict[str, tuple[Any, ...]] = {}
        self._limits: dict[str, _Limit] = {}
        """Those of run time that this replica has set, cleared or read, by budget."""
        self._looked = 0
        """How many of the holds have been asked about in this round."""
        self.forgotten_settlements = 0
        """Settlements that are not remembered one by one any more, for want of memory."""
        self.forgotten_holds = 0
        """Holds that were open, and could not be remembered for want of memory."""

    def __bool__(self) -> bool:
        spent = self._settled or self._holds or self._settled_before or self._holds_before or self._older
        return bool(spent or self._limits)

    def granted(self, hold_id: str, parts: Sequence[tuple[Window, str]], record: str, now_us: int) -> None:
        """A hold was granted; ``parts`` as it was asked for."""
        if len(self._holds) >= HOLDS_MAX // 2:
            self._forget_holds(now_us // 1000)
        if len(parts) == 1:
            window = parts[0][0]
            names = window.key
            if names not in self._windows:
                self._windows[names] = window
        else:
            names = self._names([window for window, _ in parts])
        self._holds[hold_id] = (names, record, now_us)

    def extended(self, hold_id: str, record: str, windows: Sequence[Window], now_us: int) -> None:
        """A hold is as its record says now."""
        self._let_go(hold_id)
        if record[0] not in SETTLED:
            self._holds[hold_id] = (self._names(windows), record, now_us)

    def seen(self, hold_id: str, record: str, now_us: int) -> None:
        """The store had this record of a hold then. If another replica has settled it, that one remembers it."""
        for holds in (self._holds, self._holds_before):
            known = holds.get(hold_id)
            if known is not None and known[2] <= now_us:  # else this replica has changed it since
                if record[0] in SETTLED:
                    del holds[hold_id]
                else:
                    holds[hold_id] = (known[0], record, now_us)

    def shrunk(self, hold_id: str, left: Sequence[int]) -> None:
        """So much is left of a prepaid slab, in each of its windows; of two reports, the least holds."""
        for holds in (self._holds, self._holds_before):
            if (known := holds.get(hold_id)) is not None:
                names, record, seen_us = known
                head, *segments = record.split("|")
                for number, (segment, most) in enumerate(zip(segments, left, strict=True)):
                    flag, name, base, reserved, rest = segment.split(",", 4)
                    if most < int(reserved):
                        segments[number] = f"{flag},{name},{base or reserved},{most},{rest}"
                holds[hold_id] = (names, "|".join((head, *segments)), seen_us)

    def open_hold(self, hold_id: str) -> Record | None:
        """One that this replica was granted, and has not settled; ``None`` if it knows of none."""
        known = self._holds.get(hold_id) or self._holds_before.get(hold_id)
        return None if known is None else parse_record(known[1])

    def has_settled(self, hold_id: str) -> bool:
        """Whether a settlement of this id was acknowledged to this replica, as far as it remembers."""
        return hold_id in self._settled or hold_id in self._settled_before

    def acknowledged(self, op: Op, line: str, now_ms: int) -> None:
        """A settlement was acknowledged: ``line`` is the store's answer, ``k`` or ``p``."""
        hold_id, parts = op.id, op.parts
        known = self._let_go(hold_id)
        record = op.record or (known[1] if known is not None else "")
        if len(parts) == 1:
            names = parts[0][0].key
            if names not in self._windows:
                self._windows[names] = parts[0][0]
        else:
            names = self._names([window for window, _ in parts])
        if _released_by_hand(op.letter, op.head, line):  # which settles nothing: its worker may yet commit it
            released = _Settled(op.letter, op.head, names, line, now_ms, record)
            self._holds[hold_id] = (names, _settled_record(released, [window for window, _ in parts]), now_ms * 1000)
            return
        if len(self._settled) >= SETTLEMENTS_MAX // 2:
            self._forget_settled(now_ms)
        settled, before = self._settled, self._settled_before
        if line[0] == "k":
            if hold_id in settled or hold_id in before:
                earlier = settled.get(hold_id) or before.pop(hold_id)
                if now_ms - earlier[4] >= _FORGOTTEN_MS:  # else the store has lost one of them
                    _add(self._older, [earlier])
            settled[hold_id] = (op.letter, op.head, names, line, now_ms, record)
        elif hold_id not in before and hold_id not in settled:  # else it is known whose it is
            settled[hold_id] = (op.letter, op.head, names, self._shared(line), now_ms, record)

    def _shared(self, line: str) -> str:
        """A replay as what it was, if it is in this replica's share: the first answer was lost."""
        words = line.split(" ")
        return f"k - {words[2]}" if words[3:4] == [self._replica] else line

    def told(self, hold_id: str, line: str) -> None:
        """What was told again was known: in whose share it is, the store knows best."""
        if line[0] == "p" and line.split(" ")[3:4] not in ([], ["-"]):
            for generation in (self._settled_before, self._settled):
                if hold_id in generation:
                    letter, head, names, _, at_ms, record = generation[hold_id]
                    generation[hold_id] = (letter, head, names, self._shared(line), at_ms, record)

    def _names(self, windows: Sequence[Window]) -> str:
        self._windows.update((window.key, window) for window in windows)
        return " ".join([window.key for window in windows])

    def _windows_of(self, names: str) -> list[Window]:
        return [self._windows[name] for name in names.split(" ")]

    def _let_go(self, hold_id: str) -> tuple[Any, ...] | None:
        return self._holds.pop(hold_id, None) or (self._holds_before.pop(hold_id, None) if self._holds_before else None)

    def _forget_holds(self, now_ms: int) -> None:
        self.forgotten_holds += sum(
            parse_record(record).deadline_ms > now_ms for _, record, _ in self._holds_before.values()
        )
        self._holds_before, self._holds = self._holds, {}
        self._forget_windows(now_ms)

    def _forget_settled(self, now_ms: int) -> None:
        """Keeps of the older generation what it spent."""
        _add(self._older, self._settled_before.values())
        self.forgotten_settlements += len(self._settled_before)
        self._settled_before, self._settled = self._settled, {}
        self._forget_windows(now_ms)

    def _forget_windows(self, now_ms: int) -> None:
        """Forgets those that are over, and of which nothing is known."""
        for key in [*self._older]:
            end_ms = self._windows[key].span.end_ms
            if end_ms is not None and end_ms + LONGEST_HOLD_MS < now_ms:
                del self._older[key]
        if len(self._windows) > _WINDOWS_MAX:
            used = {
                key
                for known in (*self._settled_before.values(), *self._settled.values())
                for key in known[2].split(" ")
            }
            used |= {
                key for hold in (*self._holds_before.values(), *self._holds.values()) for key in hold[0].split(" ")
            }
            self._windows = {key: w for key, w in self._windows.items() if key in used or key in self._older}

    # -- limits of run time --------------------------------------------------------------------------------------------

    def limit_changed(self, budget: Budget, units: str, until_ms: int, changed_us: int) -> None:
        """This replica has set a limit then, or cleared it: no units."""
        until_ms = until_ms if units else _CLEARED
        self._limits[budget.name] = _Limit(units or "-", until_ms, changed_us, budget.definition)

    def limit_seen(self, budget: Budget, stored: str, now_us: int) -> None:
        """The store had this limit then, or none: an empty text."""
        known = self._limits.get(budget.name)
        if known is not None and known.changed_us > now_us:
            return  # that reply is older
        if stored:
            units, until_ms, *changed_us = stored.split(" ")
            self._limits[budget.name] = _Limit(units, int(until_ms), int(*changed_us), budget.definition)
        elif known is not None and known.until_ms != _CLEARED:
            del self._limits[budget.name]

    def limits(self, keys: Keys, now_ms: int) -> list[Op]:
        """First of all: limits that have not ended, and what tells that one was cleared."""
        return [
            Op("-", keys.hold("-"), f"Q - {name} {units} {until_ms} {changed_us} {definition}", [])
            for name, (units, until_ms, changed_us, definition) in self._limits.items()
            if until_ms in (0, _CLEARED) or until_ms > now_ms
        ]

    # -- holds that others have settled --------------------------------------------------------------------------------

    def unsettled(self, now_ms: int, most: int) -> list[str]:
        """Ids of open holds, to be asked about; all of them in turn, some at a time."""
        holds = chain(self._holds_before.items(), self._holds.items())
        some = list(islice(holds, self._looked, self._looked + most))
        self._looked = self._looked + most if len(some) == most else 0
        return [i for i, (_, record, _) in some if parse_record(record).created_us < (now_ms - _FRESH_MS) * 1000]

    # -- to tell again -------------------------------------------------------------------------------------------------

    def settlements(self, keys: Keys, now_ms: int) -> list[Op]:
        """First: those in its share, by id, each as it was."""
        for holds in (self._holds_before, self._holds):
            for hold_id in [i for i, (_, _, seen_us) in holds.items() if seen_us < (now_ms - HOLD_AGE_MAX_MS) * 1000]:
                del holds[hold_id]
        self._forget_windows(now_ms)
        return self._settlements(keys, now_ms, True)

    def others(self, keys: Keys, now_ms: int) -> list[Op]:
        """As well: those in the shares of other replicas."""
        return self._settlements(keys, now_ms, False)

    def _settlements(self, keys: Keys, now_ms: int, own: bool) -> list[Op]:
        remembered = [(i, _Settled(*known)) for i, known in (self._settled_before | self._settled).items()]
        return [
            self._again(hold_id, keys.hold(hold_id), settled)
            for hold_id, settled in remembered
            if settled.own is own and settled.at_ms >= now_ms - AGE_MAX_MS
        ]

    def _again(self, hold_id: str, key: str, settled: _Settled) -> Op:
        windows = self._windows_of(settled.windows)
        told = self._as_it_was(hold_id, key, settled, windows)
        replica = settled.line.split(" ")[3:4]
        return told if settled.own or not replica else SettleOnBehalf(replica[0], told)

    def _as_it_was(self, hold_id: str, key: str, settled: _Settled, windows: list[Window]) -> Op:
        if settled.letter != "N":
            return Restore(hold_id, key, windows, _settled_record(settled, windows))
        spent = [(window, f":{units}") for window, units in zip(windows, settled.units, strict=True)]
        return Op(hold_id, key, f"N {hold_id} 1 {settled.head.split(' ', 3)[3]}", spent)

    def shares(self, keys: Keys) -> list[Op]:
        """Then: the totals, which raise what is less than they are."""
        totals = dict(self._older)
        for generation in (self._settled_before, self._settled):
            _add(totals, generation.values())
        return [
            Op("-", keys.hold("-"), "T -", [(self._windows[key], f":{units}")])
            for key, units in totals.items()
            if units
        ]

    def holds(self, keys: Keys) -> list[Op]:
        """Last: the open holds that the store does not know."""
        remembered = self._holds_before | self._holds
        return [
            Restore(hold_id, keys.hold(hold_id), self._windows_of(names), record)
            for hold_id, (names, record, _) in remembered.items()
        ]


def _add(totals: dict[str, int], known: Iterable[tuple[Any, ...]]) -> None:
    """Adds what is in this replica's share, per key of a window."""
    for _, _, names, line, _, _ in known:
        if line[0] != "k":
            continue
        told = line[line.rfind(" ") + 1 :]
        if " " not in names and "," not in told:
            totals[names] = totals.get(names, 0) + int(told)
        else:
            for key, units in zip(names.split(" "), told.split(","), strict=False):
                totals[key] = totals.get(key, 0) + int(units)


def _released_by_hand(letter: str, head: str, line: str) -> bool:
    """Whether a settlement was a release that the worker's later commit still corrects.

    By its id: for good if the hold was open until then. Of what others did before, that is not known.
    """
    if letter != "L":
        return False
    mode = head.rpartition(" ")[2]
    return mode == "1" or mode[0] == "s" or (mode == "i" and not line.startswith("k - "))


def _settled_record(settled: _Settled, windows: Sequence[Window]) -> str:
    """The record of the hold, settled as it was."""
    letter, words, line = settled.letter, settled.head.split(" "), settled.line
    remark, trace = words[2:4] if letter == "M" else ("-", "-")
    state = "c"
    charged = settled.units
    if letter == "L":
        state, charged = "z" if _released_by_hand(letter, settled.head, line) else "r", [""] * len(windows)
    given_back = f"!{words[2][1:]}!" if letter == "L" and words[2][0] == "s" else ""
    if not settled.record:
        times = f"{settled.at_ms} {settled.at_ms}000 0"
        reserved = [units or "0" for units in charged]
        segments = [f"{w.segment}{units},,{spent}" for w, units, spent in zip(windows, reserved, charged, strict=True)]
        return f"{state} c {times} -{given_back} {remark} {trace}{''.join(segments)}"
    head, *segments = settled.record.split("|")
    _, policy, deadline, created, grown, owner, operation, traced = head.split(" ")
    if remark != "-":
        operation = remark if operation == "-" else f"{operation}%20{remark}"
    if given_back:
        owner = owner.partition("!")[0] + given_back
    head = f"{state} {policy} {deadline} {created} {grown} {owner} {operation} {traced if trace == '-' else trace}"
    segments = [f"{part.rpartition(',')[0]},{units}" for part, units in zip(segments, charged, strict=True)]
    return "|".join((head, *segments))
