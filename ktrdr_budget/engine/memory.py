"""What a replica remembers of what the store acknowledged to it, so that a store that lost it can be told again (P13).

Three things, all by ids or as totals, so that telling them twice changes nothing: its own *share* of each window's
spend, the *holds* that it was granted, and a bounded number of recent *settlements*. A settlement that is remembered
restores its id, too; one that is not is still in the share. A settlement wins over an open hold.

Each settlement is in one replica's share: that of the one whose request made it; the store's record names it. Another
one that was told of it (its own request was a replay) remembers it as well, and tells it on behalf of the first, which
may be gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from ktrdr_budget.engine.protocol import LONGEST_HOLD_MS, Commit, Elsewhere, Op, Record, Window, parse_record

if TYPE_CHECKING:
    from ktrdr_budget.engine.keys import Keys

__all__ = ["Memory", "Repair"]

SETTLEMENTS_MAX = 20_000
"""At most; at least half as many."""
HOLDS_MAX = 10_000
"""At most; at least half as many. Fewer than settlements: a hold that another replica has settled is not to be
remembered for longer than that."""
AGE_MAX_MS = LONGEST_HOLD_MS // 2
"""A settlement is told again only while the store cannot have forgotten its id, which it does a day after it."""
HOLD_AGE_MAX_MS = AGE_MAX_MS
"""A hold may have been settled elsewhere since it was granted: it is not remembered for longer than that is."""
_FRESH_MS = 2000
"""Before that age, nobody asks whether a hold was settled elsewhere: most are settled here by then."""
_WINDOWS_MAX = 4096


class _Held(NamedTuple):
    """Of texts only: the garbage collector need not look at them again and again."""

    windows: str
    """Their keys."""
    record: str
    """As the store has it."""


class _Settled(NamedTuple):
    """The same of a settlement."""

    letter: str
    words: str
    """The operation's head; of D, which has lost them there, the labels."""
    windows: str
    """Their keys."""
    line: str
    """The store's answer."""
    at_ms: int

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
        self._looked = 0
        """How many of the holds have been asked about in this round."""
        self.forgotten_settlements = 0
        """Settlements that are not remembered one by one any more, for want of memory."""
        self.forgotten_holds = 0
        """Holds that were open, and could not be remembered for want of memory."""

    def __bool__(self) -> bool:
        return bool(self._settled or self._holds or self._settled_before or self._holds_before or self._older)

    def granted(self, hold_id: str, parts: Sequence[tuple[Window, str]], record: str, now_ms: int) -> None:
        """A hold was granted; ``parts`` as it was asked for."""
        if len(self._holds) >= HOLDS_MAX // 2:
            self._forget_holds(now_ms)
        if len(parts) == 1:
            window = parts[0][0]
            names = window.key
            if names not in self._windows:
                self._windows[names] = window
        else:
            names = self._names([window for window, _ in parts])
        self._holds[hold_id] = (names, record)

    def extended(self, hold_id: str, record: str, windows: Sequence[Window]) -> None:
        """A hold is as its record says now."""
        self._let_go(hold_id)
        if record[0] == "o":
            self._holds[hold_id] = (self._names(windows), record)

    def shrunk(self, hold_id: str, left: Sequence[int]) -> None:
        """So much is left of a prepaid slab, in each of its windows; of two reports, the least holds."""
        for holds in (self._holds, self._holds_before):
            if (known := holds.get(hold_id)) is not None:
                names, record = known
                head, *segments = record.split("|")
                for number, (segment, most) in enumerate(zip(segments, left, strict=True)):
                    flag, name, base, reserved, rest = segment.split(",", 4)
                    segments[number] = f"{flag},{name},{base},{min(int(reserved), most)},{rest}"
                holds[hold_id] = (names, "|".join((head, *segments)))

    def open_hold(self, hold_id: str) -> Record | None:
        """One that this replica was granted, and has not settled; ``None`` if it knows of none."""
        known = self._holds.get(hold_id) or self._holds_before.get(hold_id)
        return None if known is None else parse_record(known[1])

    def acknowledged(self, op: Op, line: str, now_ms: int) -> None:
        """A settlement was acknowledged: ``line`` is the store's answer, ``k`` or ``p``."""
        hold_id, parts, letter = op.id, op.parts, op.letter
        self._let_go(hold_id)
        if len(parts) == 1:
            names = parts[0][0].key
            if names not in self._windows:
                self._windows[names] = parts[0][0]
        else:
            names = self._names([window for window, _ in parts])
        settled = self._settled
        if len(settled) >= SETTLEMENTS_MAX // 2:
            self._forget_settled(now_ms)
            settled = self._settled
        words = op.labels if letter == "D" else op.head  # type: ignore[attr-defined]  # D is a Commit
        if line[0] == "k":
            settled[hold_id] = (letter, words, names, line, now_ms)
        elif hold_id not in self._settled_before and hold_id not in settled:  # else it is known whose it is
            settled[hold_id] = (letter, words, names, self._shared(line), now_ms)

    def _shared(self, line: str) -> str:
        """A replay as what it was, if it is in this replica's share: the first answer was lost."""
        words = line.split(" ")
        return f"k - {words[2]}" if words[3:4] == [self._replica] else line

    def told(self, hold_id: str, line: str) -> None:
        """What was told again was known: in whose share it is, the store knows best."""
        if line[0] == "p" and line.split(" ")[3:4] not in ([], ["-"]):
            for generation in (self._settled_before, self._settled):
                if hold_id in generation:
                    letter, words, names, _, at_ms = generation[hold_id]
                    generation[hold_id] = (letter, words, names, self._shared(line), at_ms)

    def _names(self, windows: Sequence[Window]) -> str:
        self._windows.update((window.key, window) for window in windows)
        return " ".join([window.key for window in windows])

    def _windows_of(self, names: str) -> list[Window]:
        return [self._windows[name] for name in names.split(" ")]

    def _let_go(self, hold_id: str) -> None:
        if self._holds.pop(hold_id, None) is None and self._holds_before:
            self._holds_before.pop(hold_id, None)

    def _forget_holds(self, now_ms: int) -> None:
        self.forgotten_holds += sum(
            parse_record(record).deadline_ms > now_ms for _, record in self._holds_before.values()
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

    # -- holds that others have settled --------------------------------------------------------------------------------

    def unsettled(self, now_ms: int, most: int) -> list[str]:
        """Ids of open holds, to be asked about; all of them in turn, some at a time."""
        holds = chain(self._holds_before.items(), self._holds.items())
        some = list(islice(holds, self._looked, self._looked + most))
        self._looked = self._looked + most if len(some) == most else 0
        return [i for i, (_, record) in some if parse_record(record).created_us < (now_ms - _FRESH_MS) * 1000]

    def forget(self, hold_id: str) -> None:
        """Somebody else has settled it, and remembers that."""
        self._let_go(hold_id)

    # -- to tell again -------------------------------------------------------------------------------------------------

    def settlements(self, keys: Keys, now_ms: int) -> list[Op]:
        """First: those in its share, by id, each as it was."""
        oldest_us = (now_ms - HOLD_AGE_MAX_MS) * 1000
        for holds in (self._holds_before, self._holds):
            for hold_id in [i for i, (_, record) in holds.items() if parse_record(record).created_us < oldest_us]:
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
        return told if settled.own or not replica else Elsewhere(replica[0], told)

    def _as_it_was(self, hold_id: str, key: str, settled: _Settled, windows: list[Window]) -> Op:
        # A release of what the store did not know tells of no window.
        spent = [
            *zip(windows, settled.units if len(settled.units) == len(windows) else ["0"] * len(windows), strict=True)
        ]
        labels = _labels(settled)
        if settled.letter == "N":
            return Op(hold_id, key, f"N {hold_id} 1 {labels}", [(window, f":{units}") for window, units in spent])
        exactly = [(window, f":x{units}") for window, units in spent]
        if settled.letter == "L":
            return Op(hold_id, key, f"L {hold_id} {labels}", exactly)
        return Commit(hold_id, key, exactly, True, *labels.split(" "))

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
        return [self._opened(hold_id, keys.hold(hold_id), _Held(*hold)) for hold_id, hold in remembered.items()]

    def _opened(self, hold_id: str, key: str, hold: _Held) -> Op:
        record = parse_record(hold.record)
        told = [f":{segment.reserved}:{segment.accrued}" for segment in record.segments]
        parts = [*zip(self._windows_of(hold.windows), told, strict=True)]
        head = f"O {hold_id} {record.policy} {record.deadline_ms} {record.created_us} {record.labels}"
        return Op(hold_id, key, head, parts)


def _add(totals: dict[str, int], known: Iterable[tuple[Any, ...]]) -> None:
    """Adds what is in this replica's share, per key of a window."""
    for _, _, names, line, _ in known:
        if line[0] != "k":
            continue
        told = line[line.rfind(" ") + 1 :]
        if " " not in names and "," not in told:
            totals[names] = totals.get(names, 0) + int(told)
        else:
            for key, units in zip(names.split(" "), told.split(","), strict=False):
                totals[key] = totals.get(key, 0) + int(units)


def _labels(settled: _Settled) -> str:
    """Operation and trace, for the ledger, as words of the wire; of a release, its mode."""
    letter, words, _, line, _ = settled
    if letter == "L":
        mode = words.rpartition(" ")[2]
        # By its id: for good if the hold was open until then. Of what others did before, that is not known.
        by_hand = mode in ("1", "o") or mode[0] == "s" or (mode == "i" and not line.startswith("k - "))
        return "o" if by_hand else "f"
    return words if letter == "D" else words.split(" ", 2 if letter == "M" else 3)[-1]
