"""What the replicas wrote down, and what the store holds once all is quiet."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

NO_REPLY = ("StoreUnavailable", "StoreError")
REFUSED = ("BudgetExceeded", "HoldConflict", "UnknownHold")
ACKNOWLEDGED = ("done", "replayed", "heard", "deferred", "prepaid")
STATES = {"o": "open", "x": "unconfirmed", "z": "released", "c": "committed", "r": "released", "n": "recorded"}


# -- calls -------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of one replica: what was asked, what was said, and when; amounts in whole units."""

    replica: str
    name: str
    """``reserve``, ``extend``, ``grow``, ``commit``, ``release`` or ``record``."""
    tenant: str
    id: str | None
    """``None`` while the limiter names it, and nobody was told."""
    asked: dict[str, int]
    began_ns: int
    ttl_ms: int = 0
    policy: str = "charge"
    ended_ns: int | None = None
    """``None``: the replica was killed before it had written down an answer."""
    word: str = "killed"
    told: dict[str, int] = field(default_factory=dict)
    windows: dict[str, str] = field(default_factory=dict)
    ambiguous: bool = True
    stood_ns: list[tuple[int, int]] = field(default_factory=list)
    """From when until when its process stood still meanwhile."""

    @property
    def acknowledged(self) -> bool:
        """Whether it was done, now or before."""
        return self.word in ACKNOWLEDGED

    @property
    def unknown(self) -> bool:
        """Whether it may have been done."""
        return self.word in ("killed", "cancelled", "unguarded") or (self.word in NO_REPLY and self.ambiguous)

    @property
    def seconds(self) -> float:
        return 0.0 if self.ended_ns is None else (self.ended_ns - self.began_ns) / 1e9

    def late_s(self, timeout_s: float) -> float:
        """For how long its process ran between its deadline and its end."""
        due_ns = self.began_ns + int(timeout_s * 1e9)
        if self.ended_ns is None or self.ended_ns <= due_ns:
            return 0.0
        stood = sum(max(0, min(end, self.ended_ns) - max(begin, due_ns)) for begin, end in self.stood_ns)
        return (self.ended_ns - due_ns - stood) / 1e9


def read(directory: Path) -> list[Call]:
    """The calls of every replica, in the order of their beginnings."""
    calls: list[Call] = []
    for path in sorted(directory.glob("*.jsonl")):
        begun: dict[int, Call] = {}
        stood: list[tuple[int, int]] = []
        for line in path.read_text().splitlines():
            try:
                words = json.loads(line)
            except ValueError:  # the last words of a process that was killed
                continue
            if "call" in words:
                call = Call(
                    path.stem, words["call"], words["tenant"], words["id"], words["asked"], words["at"],
                    words.get("ttl_ms", 0), words.get("policy", "charge"),
                )  # fmt: skip
                begun[words["n"]] = call
                calls.append(call)
            elif "stood_ns" in words:
                stood.append((words["at"] - words["stood_ns"], words["at"]))
            else:
                _end(begun[words["n"]], words)
        _tell_standstills(begun.values(), stood)
    return sorted(calls, key=lambda call: call.began_ns)


def _tell_standstills(calls: Iterable[Call], stood: list[tuple[int, int]]) -> None:
    """One process is one event loop; of its standstills none overlaps another, and they are in order."""
    begins = [begin for begin, _ in stood]
    for call in calls:
        if call.ended_ns is not None:
            first = max(0, bisect_right(begins, call.began_ns) - 1)
            call.stood_ns = stood[first : bisect_right(begins, call.ended_ns)]


def _end(call: Call, words: dict[str, Any]) -> None:
    call.ended_ns, call.word, call.ambiguous = words["at"], words["word"], words["ambiguous"]
    call.told, call.windows = words.get("told", {}), words.get("windows", {})
    call.id = words.get("hold_id", call.id)


@dataclass
class Story:
    """All calls about one id."""

    id: str
    calls: list[Call] = field(default_factory=list)
    is_drawn: bool = False
    """Whether a lease paid for it: the store has no hold of this id, but a chunk that covers it."""

    def of(self, *names: str) -> Iterable[Call]:
        return (call for call in self.calls if call.name in names)

    @property
    def asked(self) -> dict[str, int]:
        """What was reserved or recorded under this id."""
        return next((call.asked for call in self.of("reserve", "record")), {})

    @property
    def policy(self) -> str:
        return next((call.policy for call in self.of("reserve")), "charge")

    @property
    def granted(self) -> Call | None:
        """The acknowledged grant that was heard of first."""
        grants = [call for call in self.of("reserve") if call.acknowledged]
        return min(grants, key=lambda call: call.ended_ns or 0, default=None)

    @property
    def settled(self) -> Call | None:
        """The acknowledged settlement that was heard of first."""
        settled = [call for call in self.of("commit", "release", "record") if call.acknowledged]
        return min(settled, key=lambda call: call.ended_ns or 0, default=None)

    @property
    def unguarded(self) -> bool:
        """Whether policy ``allow`` granted it: the store may not have the hold."""
        return any(call.word == "unguarded" for call in self.calls)

    def settling_since(self) -> float:
        """When somebody first began to settle it."""
        return min((call.began_ns for call in self.of("commit", "release")), default=float("inf"))


def stories(calls: Iterable[Call]) -> dict[str, Story]:
    """By id."""
    found: dict[str, Story] = {}
    for call in calls:
        if call.id is not None:
            found.setdefault(call.id, Story(call.id)).calls.append(call)
    return found


def split_drawn(calls: list[Call], stored: Container[str]) -> tuple[list[Call], dict[str, Story]]:
    """Separate the calls that the store has decided from those of ids that leases have paid for.

    An id that was drawn from a lease is that hold for the calls of its replica from then on. The store may have granted
    the reservation, too, and released it again: the outcome of that request is unknown.

    Args:
        stored: ids that the store has.
    """
    since: dict[tuple[str, str | None], int] = {}
    for call in calls:
        if call.name == "reserve" and call.word == "prepaid":
            key = call.replica, call.id
            since[key] = min(call.ended_ns or 0, since.get(key, call.ended_ns or 0))
    others: list[Call] = []
    drawn: dict[str, Story] = {}
    for call in calls:
        at_ns = since.get((call.replica, call.id))
        is_drawn = at_ns is not None and (call.ended_ns is None or call.ended_ns >= at_ns)
        if call.name == "record" and call.word == "deferred" and call.id not in stored:
            is_drawn = True
        if is_drawn:
            name = f"{call.id} of {call.replica}"
            drawn.setdefault(name, Story(name, is_drawn=True)).calls.append(call)
            if call.name not in ("reserve", "record"):
                continue
            call = replace(call, word="StoreUnavailable", told={}, windows={}, ambiguous=True)
        others.append(call)
    return others, drawn


# -- the store, at rest ------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """What a hold has to do with one window."""

    budget: str
    window: str
    reserved: int
    accrued: int
    charged: int
    slots: bool


@dataclass
class Stored:
    """A hold's record."""

    state: str
    policy: str
    segments: list[Segment]
    operation: str = ""
    """Its label."""

    @property
    def is_chunk(self) -> bool:
        """Whether it is a chunk of a lease."""
        return self.operation == "lease"


@dataclass
class Books:
    """What the store holds of one tenant; windows by ``budget:window``."""

    sums: dict[str, Counter[str]] = field(default_factory=dict)
    entered: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Per window, what the ledger's entries of each id add up to; ``-``: told again as a total."""
    holds: dict[str, Stored] = field(default_factory=dict)
    immortal: list[str] = field(default_factory=list)
    """Keys that ought to expire, and never will."""


def books(client: Any, tenant: str) -> Books:
    """Reads all of it, without the package."""
    found, prefix = Books(), f"ktrdr:{{{tenant}}}:"
    node = {"target_nodes": client.get_node_from_key(prefix)} if hasattr(client, "get_node_from_key") else {}
    names = sorted({key.removeprefix(prefix) for key in client.scan_iter(match=f"{prefix}*", count=1000, **node)})
    for start in range(0, len(names), _PAGE):
        page = [name.split(":", 1) for name in names[start : start + _PAGE] if name[:2] in ("w:", "l:", "h:")]
        pipeline = client.pipeline(transaction=False)
        for kind, name in page:
            key = f"{prefix}{kind}:{name}"
            if kind == "l":
                pipeline.lrange(key, 0, -1)
            else:
                {"w": pipeline.hgetall, "h": pipeline.get}[kind](key)
            pipeline.pttl(key)
        replies = iter(pipeline.execute())
        for (kind, name), value, ttl_ms in zip(page, replies, replies, strict=True):
            name = _public(name)
            _enter(found, kind, name, value)
            if ttl_ms == -1 and not name.endswith(":ever"):
                found.immortal.append(f"{prefix}{kind}:{name}")
    return found


_PAGE = 1000


def _public(window: str) -> str:
    """Without the fingerprint of its definition; ids have no `~`."""
    return window.partition("~")[0]


def _enter(found: Books, kind: str, name: str, value: Any) -> None:
    if kind == "w":
        sums = {field: int(value.get(field) or 0) for field in ("spent", "held", "unconfirmed")}
        found.sums[name] = Counter(sums)
    elif kind == "l":
        for entry in value:
            _, units, _, hold_id, *_ = entry.split(" ")
            found.entered[name][hold_id] += int(units)
    elif value:
        found.holds[name] = parse(value)


def parse(record: str) -> Stored:
    """The grammar is in `docs/wire.md`."""
    head, *rest = record.split("|")
    state, policy, _, _, _, _, operation, *_ = head.split(" ")
    segments = []
    for text in rest:
        flag, name, _, reserved, accrued, charged = text.partition(" ")[0].split(",")
        budget, _, window = name.rpartition(":")
        figures = int(reserved), int(accrued or 0), int(charged or 0)
        segments.append(Segment(budget, _public(window), *figures, slots=flag == "s"))
    return Stored(STATES[state], {"c": "charge", "a": "accrued", "r": "release"}[policy], segments, operation)
