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

from ktrdr_budget.engine.protocol import LONGEST_HOLD_MS, Commit, Elsewhere, Op, Window

if TYPE_CHECKING:
    from ktrdr_budget.engine.keys import Keys
    from ktrdr_budget.engine.protocol import Record

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
    """Of texts and numbers only: the garbage collector need not look at them again and again."""

    windows: str
    """Their keys."""
    units: str
    """Of each window, as on the wire: ``:reserved``, or ``:reserved:accrued``."""
    policy: str
    created_us: int
    deadline_ms: int
    labels: str


_CREATED, _DEADLINE = _Held._fields.index("created_us"), _Held._fields.index("deadline_ms")


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

    def granted(
        self, hold_id: str, parts: Sequence[tuple[Window, str]], policy: str, now_us: int, deadline_ms: int, labels: str
    ) -> None:
        """A hold was granted; ``parts`` as it was asked for, ``labels``: owner, operation and trace, on the wire."""
        if len(self._holds) >= HOLDS_MAX // 2:
            self._forget_holds(now_us // 1000)
        if len(parts) == 1:
            window, units = parts[0]
            names = window.key
            if names not in self._windows:
                self._windows[names] = window
        else:
            names, units = self._names([window for window, _ in parts]), " ".join([units for _, units in parts])
        self._holds[hold_id] = (names, units, policy, now_us, deadline_ms, labels)

    def extended(self, hold_id: str, record: Record, windows: Sequence[Window], labels: str) -> None:
        """A hold is as its record says now."""
        self._let_go(hold_id)
        if record.state != "o":
            return
        units = " ".join([f":{segment.reserved}:{segment.accrued}" for segment in record.segments])
        names = self._names(windows)
        self._holds[hold_id] = (names, units, record.policy, record.created_us, record.deadline_ms, labels)

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
        words = op.labels if letter == "D" and isinstance(op, Commit) else op.head
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
        self.forgotten_holds += sum(hold[_DEADLINE] > now_ms for hold in self._holds_before.values())
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
        return [hold_id for hold_id, hold in some if hold[_CREATED] < (now_ms - _FRESH_MS) * 1000]

    def forget(self, hold_id: str) -> None:
        """Somebody else has settled it, and remembers that."""
        self._let_go(hold_id)

    # -- to tell again -------------------------------------------------------------------------------------------------

    def settlements(self, keys: Keys, now_ms: int) -> list[Op]:
        """First: those in its share, by id, each as it was."""
        oldest_us = (now_ms - HOLD_AGE_MAX_MS) * 1000
        for holds in (self._holds_before, self._holds):
            for hold_id in [i for i, hold in holds.items() if hold[_CREATED] < oldest_us]:
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
        commit = Commit(hold_id, key, exactly, True, *labels.split(" "))
        return commit if commit.letter == "M" else commit.in_detail()

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
        told = [units if units.count(":") == 2 else f"{units}:0" for units in hold.units.split(" ")]
        parts = [*zip(self._windows_of(hold.windows), told, strict=True)]
        return Op(hold_id, key, f"O {hold_id} {hold.policy} {hold.deadline_ms} {hold.created_us} {hold.labels}", parts)


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
    letter, words, *_ = settled
    if letter == "L":
        return "o" if words.rpartition(" ")[2] in ("1", "o") else "f"
    if letter == "C":
        return "- -"
    return words if letter == "D" else words.split(" ", 2 if letter == "M" else 3)[-1]
