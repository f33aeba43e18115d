"""What is said to the store and what it answers, without any I/O: sync, async and tests share all of it.

A request is an :class:`Op` (one operation of the write script; many travel in one batch) or a :class:`Command` (a read,
or a plain command). The words on the wire are described in the headers of ``lua/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple
from urllib.parse import quote, unquote

from ktrdr_budget.engine.protocol.keys import public_window, split_name, stored_window
from ktrdr_budget.engine.protocol.scripts import FAST_PATH, script_for
from ktrdr_budget.models import Budget, HoldState, HoldView, OnExpiry
from ktrdr_budget.money import Amount, from_units
from ktrdr_budget.periods import Span, from_ms

if TYPE_CHECKING:
    from ktrdr_budget.engine.protocol.keys import Keys

__all__ = [
    "Command",
    "Commit",
    "Head",
    "Header",
    "Op",
    "Prepared",
    "Read",
    "ReadHead",
    "Record",
    "Reply",
    "Reservation",
    "Restore",
    "SettleOnBehalf",
    "Window",
    "encode_batch",
    "give_back",
    "owner_word",
    "parse_batch",
    "parse_read",
    "parse_record",
    "render_record",
]

LONGEST_HOLD_MS: Final = 86_400_000
_LASTING_MS: Final = 315_360_000_000
"""Ten years: what an open hold's record lives for in windows without end, until somebody sees that it is due."""
_ENDLESS_MS: Final = 9_999_999_999_999
_SIMPLE_UNITS: Final = 2**46
"""Commits of less may be simple: as many as a batch has add up exactly."""
FLAGS: Final = {"u": "usd", "n": "count", "s": "slots"}
STATES: Final[dict[str, HoldState]] = {
    "o": "open",
    "x": "unconfirmed",
    "z": "released",
    "c": "committed",
    "r": "released",
    "n": "recorded",
}
REPORT: Final = "3"
"""Of an operation E: what was used, and nothing else."""
SETTLED: Final = "crn"
"""States in which nothing changes any more."""
POLICIES: Final[dict[str, OnExpiry]] = {"c": "charge", "a": "accrued", "r": "release"}
POLICY_CODES: Final = {policy: code for code, policy in POLICIES.items()}


Granted = tuple[str, str]
"""A hold as the store was seen to have it: its record, and its operation and trace as words of the wire."""


class Window:
    """One budget in one period, ready for the wire. Equal windows of a process are one object."""

    __slots__ = (
        "begun",
        "budget",
        "expires_ms",
        "flag",
        "key",
        "ledger_key",
        "name",
        "segment",
        "span",
        "stored",
        "unit",
        "words",
    )

    def __init__(
        self,
        keys: Keys,
        budget: str,
        span: Span,
        flag: str,
        definition: str,
        expires_ms: int,
        limit: str,
        asserts: bool,
        stored: str | None = None,
    ) -> None:
        self.begun = False
        """Whether this replica was granted something in it: it exists, and knows this replica's limit."""
        self.budget = budget
        self.span = span
        self.flag = flag
        self.unit = "usd" if flag == "u" else "count"
        self.expires_ms = expires_ms
        """0: never."""
        self.stored = stored_window(span.name, definition) if stored is None else stored
        """Its name in the store."""
        self.name = f"{budget}:{self.stored}"
        self.segment = f"|{flag},{self.name},,"
        """How the record of a hold begins to tell of this window."""
        self.key = keys.window(budget, self.stored)
        self.ledger_key = keys.ledger(budget, self.stored)
        bounds = (str(span.start_ms), str(span.end_ms or 0), str(expires_ms))
        self.words = (self.name, flag, definition, *bounds, limit, "!" if asserts else "?")


def flag_of(budget: Budget) -> str:
    """How a hold record marks this budget's amounts: ``u`` dollars, ``n`` a count, ``s`` slots."""
    return "s" if budget.kind == "slots" else "u" if budget.unit == "usd" else "n"


class Op:
    """One operation of the write script: its letter and fields in ``head``, and the windows that it touches.

    Each of ``parts`` is a window with the text that follows its number on the wire; ``tail`` follows them.
    """

    __slots__ = (
        "brief",
        "brief_parts",
        "brief_tail",
        "grants",
        "head",
        "id",
        "key",
        "letter",
        "parts",
        "record",
        "request",
        "tail",
    )

    def __init__(
        self, hold_id: str, key: str, head: str, parts: Sequence[tuple[Window, str]], *, request: str = ""
    ) -> None:
        self.id = hold_id
        self.key = key
        self.head = head
        self.parts = parts
        self.letter = letter = head[0]
        self.grants = letter == "R" or (letter == "E" and any(tail.split(":")[2] != "0" for _, tail in parts))
        """Whether this asks for money, by a reservation or growth (and so is decided after what may give some back)."""
        self.tail = ""
        self.request = request
        """Of a reservation, and of what gives it back: the word that names it, if its id is the caller's own."""
        self.record = ""
        """The record of the hold that it settles, where it was read for that, or of the one that it restores."""
        self.brief: str | None = None
        """Its head as ``fast_path.lua`` reads it, with these parts and this tail; ``None`` if that does not know it."""
        self.brief_parts = parts
        self.brief_tail = ""

    @property
    def is_fact(self) -> bool:
        """Whether it reports what has happened, and is sent although its caller is gone."""
        if self.letter == "E":
            return any(not tail.startswith(":0:") for _, tail in self.parts)
        return self.letter != "R"

    @property
    def units(self) -> list[int]:
        """What a settlement says of each window: whole units."""
        return [int(tail.lstrip(":xra")) for _, tail in self.parts]

    def again(self) -> None:
        """Told before it is sent again because an answer was lost."""


class Reservation(Op):
    """A reservation (R).

    Args:
        labels: owner (and request), operation and trace, as words of the wire.
        now_ms: tells the store's clock, as far as it is known.
        request: names it, if its id is the caller's own.
    """

    __slots__ = ("_labels", "_policy", "_rest")

    def __init__(
        self,
        hold_id: str,
        key: str,
        ttl_ms: int,
        policy: str,
        labels: str,
        wanted: Sequence[tuple[Window, int]],
        now_ms: Callable[[], int],
        request: str = "",
    ) -> None:
        if len(wanted) == 1:
            window, units = wanted[0]
            parts, rest, expires_ms = [(window, f":{units}")], f"{labels}{window.segment}{units},,", window.expires_ms
            simple = window.begun
        else:
            parts = [(window, f":{units}") for window, units in wanted]
            rest = labels + "".join([f"{window.segment}{units},," for window, units in wanted])
            expiries = [window.expires_ms for window, _ in wanted]
            expires_ms = 0 if 0 in expiries else max(expiries)
            simple = all(window.begun for window, _ in wanted)
        # An open hold lives as long as its windows: nobody else knows what to give back to them.
        head = f"R {hold_id} {ttl_ms} {policy} {expires_ms or now_ms() + _LASTING_MS}"
        # Not through its parent's constructor, which would take as long again.
        self.id, self.key, self.head, self.letter, self.grants = hold_id, key, head, "R", True
        self.parts = self.brief_parts = parts
        self.request = request
        self.brief = head if simple else None
        self.tail = self.brief_tail = f"\n{rest}"
        self._policy = policy
        self._labels = labels
        self._rest = rest

    def granted(self, now_us: int, deadline_ms: int) -> Granted:
        """It was granted then; returns the hold as the store has it."""
        if self.brief is None:
            for window, _ in self.parts:
                window.begun = True
        return f"o {self._policy} {deadline_ms} {now_us} 0 {self._rest}", self._labels.partition(" ")[2]


class Commit(Op):
    """A commit (D; with a remark for the ledger M).

    Args:
        parts: each window with its mode and units.
    """

    __slots__ = ("told",)

    def __init__(self, hold_id: str, key: str, parts: Sequence[tuple[Window, str]], remark: str, trace: str) -> None:
        head = f"D {hold_id}" if remark == "-" else f"M {hold_id} {remark} {trace}"
        super().__init__(hold_id, key, head, parts)
        self.told = ""
        """The answer to a simple commit, at length."""

    def simplify(
        self, replica: str, granted: Granted, reserved: Sequence[tuple[Window, int]], settled: Sequence[int]
    ) -> None:
        """Lets it go the simple way, for a hold that is as it was granted.

        Args:
            replica: who commits it.
            reserved: its windows and what it reserved there.
            settled: what it cost there; 0 for slots.
        """
        record, labels = granted
        if len(settled) == 1:  # by far the most
            told = str(settled[0])
            record_then = f"c{record[1:]}{told}"
        else:
            head, *segments = record.split("|")
            charged = "".join([f"|{segment}{units}" for segment, units in zip(segments, settled, strict=True)])
            record_then, told = f"c{head[1:]}{charged}", ",".join(map(str, settled))
        parts, overrun = [], "-"
        for (window, counted), units in zip(reserved, settled, strict=True):
            if counted > _SIMPLE_UNITS or units > _SIMPLE_UNITS:
                return
            if units > counted:
                parts.append((window, f":{counted}:{units}o"))
                overrun = "o"
            else:
                parts.append((window, f":{counted}:" if window.flag == "s" else f":{counted}:{units}"))
        self.brief = f"C {self.id} {labels}"
        self.brief_tail = f"\n{record}\n{record_then} {replica}"
        self.brief_parts = parts
        self.told = f"k {overrun} {told}"


class Restore(Op):
    """A hold as its record says (K): open again, or settled, in a store that does not know it, or not so."""

    __slots__ = ()

    def __init__(self, hold_id: str, key: str, windows: Sequence[Window], record: str) -> None:
        super().__init__(hold_id, key, f"K {hold_id}", [(window, ":") for window in windows])
        self.tail = f"\n{record}"
        self.record = record

    @property
    def units(self) -> list[int]:
        """What it was charged in each window."""
        return [segment.charged for segment in parse_record(self.record).segments]


class SettleOnBehalf(Op):
    """A settlement that is in another replica's share, replayed on its behalf (S)."""

    __slots__ = ()

    def __init__(self, replica: str, settlement: Op) -> None:
        super().__init__(settlement.id, settlement.key, f"S {replica} {settlement.head}", settlement.parts)
        self.tail = settlement.tail


class Header(NamedTuple):
    """What a replica says of itself in each batch."""

    replica: str
    epoch: str
    """The store's epoch, as this replica knows it; ``-`` if it does not."""
    acknowledged: str
    """How many of its writes the store has acknowledged."""
    started: str
    """When it started, in microseconds by the store's clock; its age with a minus sign while it does not know that."""
    settings: str
    id_memory_ms: str


class Command(NamedTuple):
    """A script (``script`` set) or a plain command of the store, whose reply says nothing of budgets or holds."""

    script: str | None
    keys: Sequence[str]
    args: Sequence[str | int]


class Prepared(NamedTuple):
    """A settlement or a report by id: the windows that it names are known once the record of its hold has been read."""

    op: Op
    """The id and the key of the hold; its head only tells equal requests from others."""
    complete: Callable[[Record], Op]


class Read(NamedTuple):
    """A script that reads budgets or holds; its reply begins with a :class:`ReadHead`."""

    script: str
    keys: Sequence[str]
    args: Sequence[str | int]
    while_recovering: Literal["answers", "answers if found", "waits"] = "answers"
    """Whether a reply counts while replicas replay what the store has lost: as it is, unless it is empty, or not."""
    prepares: Prepared | None = None
    """The fact that is sent once this has been read."""


class ReadHead(NamedTuple):
    """Which state of the store a read's reply shows."""

    now_us: int
    epoch: str
    acknowledged: int
    recovering_until_ms: int
    """0 if nothing that is known to be lost may still be missing."""


@dataclass(frozen=True, slots=True)
class Head:
    """The first line of a batch's reply."""

    now_us: int
    went_back: bool
    writes: int
    epoch: str | None
    """Set when it differs from the one that the request knew."""
    due: tuple[str, ...]


Reply = tuple[str, Head]
"""The answer to one operation, and the head of its batch."""


def encode_batch(
    keys: Keys, header: Header, ops: Sequence[Op], *, simple: bool = False
) -> tuple[str, list[str], list[str]]:
    """The write script that the batch needs, and its ``KEYS`` and ``ARGV``; ``fast_path.lua`` if it knows all of it."""
    if simple:
        for op in ops:
            if op.brief is None:
                break
        else:
            return _encode_simple(keys, header, ops)
    numbers: dict[str, str] = {}
    letters: set[str] = set()
    window_keys: list[str] = []
    words: list[str] = []
    hold_keys: list[str] = []
    rendered: list[str] = []
    for op in ops:
        text = op.head
        for window, tail in op.parts:
            number = numbers.get(window.key)
            if number is None:
                number = numbers[window.key] = f" {len(numbers) + 1}"
                words.extend(window.words)
                window_keys.append(window.key)
                window_keys.append(window.ledger_key)
            text += number + tail
        rendered.append(text + op.tail)
        hold_keys.append(op.key)
        letters.add(op.letter)
    names = [*keys.of_writes, *window_keys, *hold_keys]
    replica, epoch, acknowledged, started, settings, _ = header
    argv = [replica, epoch, acknowledged, started, str(len(numbers)), settings, *words, *rendered]
    return script_for(letters), names, argv


def _encode_simple(keys: Keys, header: Header, ops: Sequence[Op]) -> tuple[str, list[str], list[str]]:
    """As ``fast_path.lua`` reads it: what is reserved in comes after what is only settled."""
    numbers: dict[str, str] = {}
    window_keys: list[str] = []
    reserved_in: list[str] = []
    hold_keys: list[str] = []
    rendered: list[str] = []
    current: set[str] = set()
    start_ms, end_ms = 0, _ENDLESS_MS
    for op in ops:
        text: str = op.brief  # type: ignore[assignment]  # the caller has looked
        reserves = op.grants
        for window, tail in op.brief_parts:
            key = window.key
            number = numbers.get(key)
            if number is None:
                number = numbers[key] = f" {len(numbers) + 1}"
                window_keys.append(key)
                window_keys.append(window.ledger_key)
                reserved_in.append("-")
            if reserves and key not in current:
                current.add(key)
                reserved_in[int(number) - 1] = "!"
                span = window.span
                start_ms = max(start_ms, span.start_ms)
                end_ms = min(end_ms, span.end_ms or _ENDLESS_MS)
            text += number + tail
        rendered.append(text + op.brief_tail)
        hold_keys.append(op.key)
    names = [*keys.of_writes[:4], *window_keys, *hold_keys]
    replica, epoch, acknowledged, started, settings, id_memory_ms = header
    bounds = f"{start_ms:013d}000", f"{end_ms:013d}000"
    claim = f"{started:0>16} {replica}"
    argv = [f"r:{replica}", epoch, acknowledged, claim, *bounds, id_memory_ms, settings, str(len(reserved_in))]
    return FAST_PATH, names, [*argv, *reserved_in, *rendered]


def parse_batch(reply: bytes | str) -> tuple[Head, list[str]]:
    """The head, and a line for each operation, in order."""
    text = reply.decode() if isinstance(reply, bytes) else reply
    lines = text.split("\n")
    words = lines[0].split(" ")
    epoch = None if words[3] == "-" else words[3]
    head = Head(int(words[0]), words[1] == "L", int(words[2]), epoch, tuple(words[4:]))
    del lines[0]
    return head, lines


def parse_read(reply: Sequence[Any]) -> tuple[ReadHead, Sequence[Any]]:
    """The head of a read's reply, and what follows it."""
    head = reply[0].decode() if isinstance(reply[0], bytes) else reply[0]
    now_us, epoch, acknowledged, recovering_until_ms = head.split(" ")
    return ReadHead(int(now_us), epoch, int(acknowledged), int(recovering_until_ms)), reply[1:]


class Segment(NamedTuple):
    """One budget's part of a hold record, in whole units."""

    flag: str
    budget: str
    window: str
    """As the store names it."""
    reserved: int
    accrued: int
    charged: int
    base: int | None = None
    """What was reserved at first, if it grew since."""

    @property
    def name(self) -> str:
        """Budget and window, as in the record."""
        return f"{self.budget}:{self.window}"

    def amount(self, units: int) -> Amount:
        """Units as dollars or a count."""
        return from_units(units, FLAGS[self.flag])


class Record(NamedTuple):
    """A hold record, as the store keeps it."""

    state: str
    policy: str
    deadline_ms: int
    created_us: int
    grown_us: int
    owner: str
    operation: str
    trace_id: str
    segments: tuple[Segment, ...]
    request: str = ""
    """Names the request that it was granted to, if the caller chose the id; ends with ``!`` once it was given back."""

    @property
    def labels(self) -> str:
        """Owner and request, operation and trace, as words of the wire."""
        return " ".join((owner_word(word(self.owner), self.request), word(self.operation), word(self.trace_id)))

    @property
    def given_back(self) -> bool:
        """Whether it was released because its caller was gone before it received the grant: the id is free again."""
        return self.state == "z" and self.request.endswith("!")

    def view(self, hold_id: str) -> HoldView:
        """For the outside."""
        return HoldView(
            id=hold_id,
            state=STATES[self.state],
            amounts={s.budget: s.amount(s.reserved) for s in self.segments},
            accrued={s.budget: s.amount(s.accrued) for s in self.segments},
            charged={s.budget: s.amount(s.charged) for s in self.segments},
            windows={s.budget: public_window(s.window) for s in self.segments},
            units={s.budget: FLAGS[s.flag] for s in self.segments},
            on_expiry=POLICIES[self.policy],
            created_at=from_ms(self.created_us // 1000),
            expires_at=from_ms(self.deadline_ms),
            owner=self.owner,
            operation=self.operation,
            trace_id=self.trace_id,
            released_by_operator=self.state == "z" and not self.given_back,
        )


def parse_record(record: str) -> Record:
    """Reads a hold record; its grammar is in ``docs/wire.md``."""
    head, *segments = record.split("|")
    state, policy, deadline, created, grown, owner, operation, trace = head.split(" ")
    parsed = []
    for segment in segments:
        flag, name, base, reserved, accrued, charged = segment.partition(" ")[0].split(",")
        budget, window = split_name(name)
        counts = int(reserved), int(accrued or 0), int(charged or 0)
        parsed.append(Segment(flag, budget, window, *counts, int(base) if base else None))
    owner, _, request = owner.partition("!")
    return Record(
        state,
        policy,
        int(deadline),
        int(created),
        int(grown),
        unword(owner),
        unword(operation),
        unword(trace),
        tuple(parsed),
        request,
    )


def render_record(record: Record) -> str:
    """Writes a hold record, without the replica in whose share it is."""
    times = f"{record.deadline_ms} {record.created_us} {record.grown_us}"
    segments = [
        f"{s.flag},{s.budget}:{s.window},{s.base or ''},{s.reserved},{s.accrued or ''},{s.charged or ''}"
        for s in record.segments
    ]
    return "|".join([f"{record.state} {record.policy} {times} {record.labels}", *segments])


def given_up(record: str) -> bool:
    """Whether a hold record only keeps a request from being granted that was given up while it was under way."""
    head = record.partition("|")[0].split(" ")
    return head[0] == "r" and head[6] == "!"  # a word that no label becomes


def give_back(hold_id: str, key: str, windows: Iterable[Window], request: str) -> Op:
    """The release of a grant that no caller has received.

    An id that the limiter made is closed for good. Under the caller's own id only the grant to this very request is
    released, and not for good: a worker that has the hold by a replay may yet commit it, and the id is free again.
    """
    nothing = [(window, ":x0") for window in windows]
    return Op(hold_id, key, f"L {hold_id} {f's{request}' if request else 'f'}", nothing, request=request)


def owner_word(owner: str, request: str) -> str:
    """The word of a record for its owner, with the request that it was granted to."""
    return f"{owner}!{request}" if request else owner  # a character that no label keeps


def word(text: str) -> str:
    """Any text as one word without the record's separators; ``-`` if empty."""
    return quote(text, safe="/:@-._") if text and text != "-" else "%2D" if text else "-"


def unword(encoded: str) -> str:
    """The text that :func:`word` encoded."""
    return "" if encoded == "-" else unquote(encoded)
