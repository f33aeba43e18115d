"""The record of a hold, and the only parser and renderer of its text. ``docs/wire.md`` has the grammar of this text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote

from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.engine.protocol.keys import public_window, split_name
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.models import HoldView
from ktrdr_budget.money import Amount, from_units
from ktrdr_budget.periods import from_ms

__all__ = [
    "HoldRecord",
    "Segment",
    "created_us_of",
    "deadline_ms_of",
    "digest_of",
    "is_settled",
    "is_tombstone",
    "join_scope",
    "label_words_of",
    "owner_word",
    "parse_record",
    "split_scope",
    "scope_fields",
    "scope_word",
    "segments_of",
    "unword",
    "word",
]

_TOMBSTONE_LABEL = "!"
"""The operation in a tombstone (see :func:`is_tombstone`). No encoded label equals this text."""


class Segment(NamedTuple):
    """One budget's part of a hold record, in whole units."""

    flag: str
    budget: str
    window: str
    """The window's name in the store."""
    reserved: int
    accrued: int = 0
    charged: int = 0
    base: int | None = None
    """The amount that was reserved at first; ``None`` if the hold has not grown since."""

    @property
    def name(self) -> str:
        """``budget:window``."""
        return f"{self.budget}:{self.window}"

    def amount(self, units: int) -> Amount:
        """Convert whole units to dollars or a count."""
        return from_units(units, codes.FLAGS[self.flag])


class HoldRecord(NamedTuple):
    """A hold as the store keeps it."""

    state: str
    """A code of :data:`~.codes.STATES`."""
    policy: str
    """A code of :data:`~.codes.POLICIES`."""
    deadline_ms: int
    created_us: int
    grown_us: int
    owner: str
    operation: str
    trace_id: str
    segments: tuple[Segment, ...]
    request: str = ""
    """The granted request if the caller chose the id, else empty: a digest of its contents, a dot, and a name."""
    unreceived: bool = False
    """Whether the hold was released because its caller was gone before the grant arrived. The id is free again."""
    scope: str = ""
    """The fields of the scope: ``team=quant,user=alice``. Empty if there are none."""
    units: tuple[str, ...] = ()
    """The unit of each segment if the hold was reserved by scope, else empty."""

    @property
    def digest(self) -> str:
        """The digest of the request's contents if the caller chose the id, else empty."""
        return digest_of(self.request)

    @property
    def is_open(self) -> bool:
        """Whether the hold counts as held."""
        return self.state == codes.OPEN

    def is_due(self, now_ms: int) -> bool:
        """Whether the hold is open although its deadline has passed."""
        return self.state == codes.OPEN and self.deadline_ms <= now_ms

    def view(self, hold_id: str) -> HoldView:
        """The hold as the public API shows it."""
        return HoldView(
            id=hold_id,
            state=codes.STATES[self.state],
            amounts={s.budget: s.amount(s.reserved) for s in self.segments},
            accrued={s.budget: s.amount(s.accrued) for s in self.segments},
            charged={s.budget: s.amount(s.charged) for s in self.segments},
            windows={s.budget: public_window(s.window) for s in self.segments},
            units={s.budget: codes.FLAGS[s.flag] for s in self.segments},
            on_expiry=codes.POLICIES[self.policy],
            created_at=from_ms(self.created_us // 1000),
            expires_at=from_ms(self.deadline_ms),
            owner=self.owner,
            operation=self.operation,
            trace_id=self.trace_id,
            released_by_operator=self.state == codes.RELEASED_BY_OPERATOR and not self.unreceived,
            scope=scope_fields(self.scope),
        )

    def settled(self, state: str, charged: Sequence[int], *, remark: str = "", trace_id: str = "") -> HoldRecord:
        """The record after a settlement.

        Args:
            charged: whole units for each segment; 0 for a release.
            remark: a text that is added to the operation.
            trace_id: the new trace id; if empty, the record keeps its trace id.
        """
        segments = [s._replace(charged=units) for s, units in zip(self.segments, charged, strict=True)]
        operation = f"{self.operation} {remark}".lstrip() if remark else self.operation
        return self._replace(
            state=state, operation=operation, trace_id=trace_id or self.trace_id, segments=tuple(segments)
        )

    def render(self) -> str:
        """The text that the store keeps, without the replica that settled the hold."""
        owner = owner_word(self.owner, self.request + ("!" if self.unreceived else ""))
        times = f"{self.deadline_ms} {self.created_us} {self.grown_us}"
        labels = f"{word(self.operation)} {word(self.trace_id)} {scope_word(join_scope(self.scope, self.units))}"
        head = f"{self.state} {self.policy} {times} {owner} {labels}"
        segments = [
            f"{s.flag},{s.name},{s.base or ''},{s.reserved},{s.accrued or ''},{_charged(self.state, s)}"
            for s in self.segments
        ]
        return "|".join([head, *segments])


def _charged(state: str, segment: Segment) -> str:
    """The charge of a segment as text. A charge of 0 is empty, except for committed and recorded holds."""
    return str(segment.charged) if segment.charged or state in (codes.COMMITTED, codes.RECORDED) else ""


def parse_record(text: str) -> HoldRecord:
    """Read the text of a hold record."""
    head, *segments = text.split("|")
    state, policy, deadline, created, grown, owner, operation, trace, scope = head.split(" ")
    parsed = []
    for segment in segments:
        flag, name, base, reserved, accrued, charged = segment.partition(" ")[0].split(",")
        budget, window = split_name(name)
        counts = int(reserved), int(accrued or 0), int(charged or 0)
        parsed.append(Segment(flag, budget, window, *counts, int(base) if base else None))
    owner, _, request = owner.partition("!")
    return HoldRecord(
        state,
        policy,
        int(deadline),
        int(created),
        int(grown),
        unword(owner),
        unword(operation),
        unword(trace),
        tuple(parsed),
        request.rstrip("!"),
        request.endswith("!"),
        *split_scope(scope),
    )


# These functions read one field of a record's text. To parse a whole record takes ten times as long.


def is_settled(text: str) -> bool:
    """Whether the state is final, so that the hold does not change any more."""
    return text[0] in codes.SETTLED


def deadline_ms_of(text: str) -> int:
    """The deadline, in milliseconds since the epoch by the store's clock."""
    return int(text.split(" ", 3)[2])


def created_us_of(text: str) -> int:
    """When the store granted the hold, in microseconds since the epoch by the store's clock."""
    return int(text.split(" ", 4)[3])


def label_words_of(text: str) -> str:
    """The operation, the trace id and the fields of the scope, as words of the wire."""
    return text.partition("|")[0].split(" ", 6)[6].partition(";")[0]  # quoting leaves no ";" in a label


def is_tombstone(text: str) -> bool:
    """Whether the record is a tombstone, which only refuses a reservation that arrives after its caller is gone."""
    head = text.partition("|")[0].split(" ")
    return head[0] == codes.RELEASED and head[6] == _TOMBSTONE_LABEL


def segments_of(parts: Iterable[tuple[Window, int]]) -> tuple[Segment, ...]:
    """Segments of a new hold, from its windows and the whole units reserved in each."""
    return tuple(Segment(window.flag, window.budget, window.stored, units) for window, units in parts)


def owner_word(owner: str, request: str) -> str:
    """Encode the owner and the name of the granted request as one word of the record."""
    return f"{word(owner)}!{request}" if request else word(owner)  # quoting leaves no "!" in an owner


def digest_of(request: str) -> str:
    """The digest in :attr:`HoldRecord.request`; empty if it has none."""
    return request.rpartition(".")[0]


def scope_word(scope: str) -> str:
    """Encode the text of :func:`join_scope` as one word; its fields and units need no quoting."""
    return scope if scope and scope[0] != ";" else f"-{scope}"


def split_scope(scope: str) -> tuple[str, tuple[str, ...]]:
    """The fields and the units from the text of :func:`join_scope` or :func:`scope_word`."""
    fields, _, units = scope.partition(";")
    return "" if fields == "-" else fields, tuple(units.split(",")) if units else ()


def join_scope(fields: str, units: Sequence[str]) -> str:
    """The scope of a hold as one text: its fields, and for a hold that was reserved by scope the units."""
    return f"{fields};{','.join(units)}" if units else fields


def scope_fields(fields: str) -> dict[str, str]:
    """Parse the text of a scope's fields."""
    return dict(field.split("=", 1) for field in fields.split(",")) if fields else {}


def word(text: str) -> str:
    """Encode any text as one word without the separators of records; ``-`` if it is empty."""
    return quote(text, safe="/:@-._") if text and text != "-" else "%2D" if text else "-"


def unword(encoded: str) -> str:
    """Decode the text that :func:`word` encoded."""
    return "" if encoded == "-" else unquote(encoded)
