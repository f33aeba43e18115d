"""Histories of the replicas, and the final contents of the store."""

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
ACKNOWLEDGED = ("done", "replayed", "extended", "deferred", "prepaid")
STATES = {"o": "open", "x": "unconfirmed", "z": "released", "c": "committed", "r": "released", "n": "recorded"}


# -- calls -------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of one replica: the request, its outcome, and the times of both; amounts in whole units."""

    replica: str
    name: str
    """``reserve``, ``extend``, ``grow``, ``commit``, ``release`` or ``record``."""
    tenant: str
    id: str | None
    """``None`` if the limiter generated the id and no reply contained it."""
    requested: dict[str, int]
    began_ns: int
    ttl_ms: int = 0
    policy: str = "charge"
    ended_ns: int | None = None
    """``None`` if the replica was killed before it wrote the outcome."""
    outcome: str = "killed"
    amounts: dict[str, int] = field(default_factory=dict)
    windows: dict[str, str] = field(default_factory=dict)
    ambiguous: bool = True
    stalls_ns: list[tuple[int, int]] = field(default_factory=list)
    """Begin and end of each stall of the caller's process during the call."""

    @property
    def acknowledged(self) -> bool:
        """Whether the caller received a confirmation of this call or of an earlier call with the same id."""
        return self.outcome in ACKNOWLEDGED

    @property
    def is_grant(self) -> bool:
        """Whether the caller received a new hold."""
        return self.name == "reserve" and self.outcome in ("done", "prepaid")

    @property
    def unknown(self) -> bool:
        """Whether the call may have been executed without a confirmation."""
        return self.outcome in ("killed", "cancelled", "unguarded") or (self.outcome in NO_REPLY and self.ambiguous)

    @property
    def seconds(self) -> float:
        return 0.0 if self.ended_ns is None else (self.ended_ns - self.began_ns) / 1e9

    def late_s(self, timeout_s: float) -> float:
        """Running time of the process between the deadline and the end of the call."""
        due_ns = self.began_ns + int(timeout_s * 1e9)
        if self.ended_ns is None or self.ended_ns <= due_ns:
            return 0.0
        stalls = sum(max(0, min(end, self.ended_ns) - max(begin, due_ns)) for begin, end in self.stalls_ns)
        return (self.ended_ns - due_ns - stalls) / 1e9


def read(directory: Path) -> list[Call]:
    """Return the calls of every replica, sorted by their begin."""
    calls: list[Call] = []
    for path in sorted(directory.glob("*.jsonl")):
        begun: dict[int, Call] = {}
        stalls: list[tuple[int, int]] = []
        for line in path.read_text().splitlines():
            try:
                fields = json.loads(line)
            except ValueError:  # a killed process leaves its last line incomplete
                continue
            if "call" in fields:
                call = Call(
                    path.stem, fields["call"], fields["tenant"], fields["id"], fields["requested"], fields["at"],
                    fields.get("ttl_ms", 0), fields.get("policy", "charge"),
                )  # fmt: skip
                begun[fields["n"]] = call
                calls.append(call)
            elif "stalled_ns" in fields:
                stalls.append((fields["at"] - fields["stalled_ns"], fields["at"]))
            else:
                _end(begun[fields["n"]], fields)
        _attach_stalls(begun.values(), stalls)
    return sorted(calls, key=lambda call: call.began_ns)


def _attach_stalls(calls: Iterable[Call], stalls: list[tuple[int, int]]) -> None:
    """Set the stalls of each call of one process; the given stalls are sorted and do not overlap."""
    begins = [begin for begin, _ in stalls]
    for call in calls:
        if call.ended_ns is not None:
            first = max(0, bisect_right(begins, call.began_ns) - 1)
            call.stalls_ns = stalls[first : bisect_right(begins, call.ended_ns)]


def _end(call: Call, fields: dict[str, Any]) -> None:
    call.ended_ns, call.outcome, call.ambiguous = fields["at"], fields["outcome"], fields["ambiguous"]
    call.amounts, call.windows = fields.get("amounts", {}), fields.get("windows", {})
    call.id = fields.get("hold_id", call.id)


@dataclass
class IdHistory:
    """All calls about one id."""

    id: str
    calls: list[Call] = field(default_factory=list)
    is_drawn: bool = False
    """Whether the hold was drawn from a lease: the store has a chunk that covers it, and no hold of this id."""

    def of(self, *names: str) -> Iterable[Call]:
        return (call for call in self.calls if call.name in names)

    @property
    def requested(self) -> dict[str, int]:
        """The amounts reserved or recorded under this id."""
        return next((call.requested for call in self.of("reserve", "record")), {})

    @property
    def policy(self) -> str:
        return next((call.policy for call in self.of("reserve")), "charge")

    @property
    def granted(self) -> Call | None:
        """The first acknowledged grant."""
        grants = [call for call in self.of("reserve") if call.acknowledged]
        return min(grants, key=lambda call: call.ended_ns or 0, default=None)

    @property
    def settled(self) -> Call | None:
        """The first acknowledged settlement."""
        settled = [call for call in self.of("commit", "release", "record") if call.acknowledged]
        return min(settled, key=lambda call: call.ended_ns or 0, default=None)

    @property
    def unguarded(self) -> bool:
        """Whether policy ``allow`` granted the hold; the store may then lack it."""
        return any(call.outcome == "unguarded" for call in self.calls)

    def settling_since(self) -> float:
        """Begin of the first settlement; infinity if there is none."""
        return min((call.began_ns for call in self.of("commit", "release")), default=float("inf"))


def histories_by_id(calls: Iterable[Call]) -> dict[str, IdHistory]:
    """Group the calls by id."""
    found: dict[str, IdHistory] = {}
    for call in calls:
        if call.id is not None:
            found.setdefault(call.id, IdHistory(call.id)).calls.append(call)
    return found


def split_drawn(calls: list[Call], stored: Container[str]) -> tuple[list[Call], dict[str, IdHistory]]:
    """Separate the calls that the store decided from those about holds that were drawn from leases.

    Once a replica has drawn a hold, its calls with the id of the hold apply to the drawn hold. The store may also have
    granted the reservation and released it again, so the outcome of that request is unknown.

    Args:
        stored: ids that the store has.
    """
    since: dict[tuple[str, str | None], int] = {}
    for call in calls:
        if call.name == "reserve" and call.outcome == "prepaid":
            key = call.replica, call.id
            since[key] = min(call.ended_ns or 0, since.get(key, call.ended_ns or 0))
    others: list[Call] = []
    drawn: dict[str, IdHistory] = {}
    for call in calls:
        at_ns = since.get((call.replica, call.id))
        is_drawn = at_ns is not None and (call.ended_ns is None or call.ended_ns >= at_ns)
        if call.name == "record" and call.outcome == "deferred" and call.id not in stored:
            is_drawn = True
        if is_drawn:
            name = f"{call.id} of {call.replica}"
            drawn.setdefault(name, IdHistory(name, is_drawn=True)).calls.append(call)
            if call.name not in ("reserve", "record"):
                continue
            call = replace(call, outcome="StoreUnavailable", amounts={}, windows={}, ambiguous=True)
        others.append(call)
    return others, drawn


# -- the final contents of the store -----------------------------------------------------------------------------------


@dataclass
class Segment:
    """The part of a hold in one window."""

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
    """The label ``operation`` of the hold."""

    @property
    def is_chunk(self) -> bool:
        """Whether it is a chunk of a lease."""
        return self.operation == "lease"

    @property
    def is_tombstone(self) -> bool:
        """Whether the id was released before its reservation arrived; the reservation may still be in flight."""
        return self.state == "released" and not any(segment.reserved for segment in self.segments)


@dataclass
class Books:
    """The contents of the store for one tenant; the keys of ``sums`` and ``entered`` are ``budget:window``."""

    sums: dict[str, Counter[str]] = field(default_factory=dict)
    entered: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Per window, the sum of the ledger entries of each id; totals that a replica replayed have the id ``-``."""
    holds: dict[str, Stored] = field(default_factory=dict)
    immortal: list[str] = field(default_factory=list)
    """Keys that should have an expiry and have none."""


def books(client: Any, tenant: str) -> Books:
    """Read the contents of the store without the package."""
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
    """The public name of a window, which lacks the fingerprint of its definition; an id is returned as it is."""
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
    """Parse the record of a hold; `docs/wire.md` has the grammar."""
    head, *rest = record.split("|")
    state, policy, _, _, _, _, operation, *_ = head.split(" ")
    segments = []
    for text in rest:
        flag, name, _, reserved, accrued, charged = text.partition(" ")[0].split(",")
        budget, _, window = name.rpartition(":")
        figures = int(reserved), int(accrued or 0), int(charged or 0)
        segments.append(Segment(budget, _public(window), *figures, slots=flag == "s"))
    return Stored(STATES[state], {"c": "charge", "a": "accrued", "r": "release"}[policy], segments, operation)
