"""How reserving and settling go, step by step, for sync and async alike. What a flow is, see :mod:`.reads`."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ktrdr_budget.engine.calls.reads import RETIRE_ROUNDS, Flow, Reads
from ktrdr_budget.engine.calls.results import amounts_text, conflict, conflict_message, denial, outdated, told_amounts
from ktrdr_budget.engine.protocol import (
    POLICY_CODES,
    REPORT,
    STATES,
    Commit,
    Op,
    Prepared,
    Record,
    Reservation,
    Restore,
    Segment,
    Window,
    give_back,
    given_up,
    owner_word,
    parse_record,
    render_record,
    word,
)
from ktrdr_budget.engine.protocol.amounts import Amounts, check_amounts, commit_modes, spread
from ktrdr_budget.engine.protocol.keys import split_name
from ktrdr_budget.engine.replica.in_doubt import Doubt, Unresolved
from ktrdr_budget.engine.replica.journal import AGE_MAX_MS
from ktrdr_budget.errors import (
    BudgetExceeded,
    HoldConflict,
    InvalidAmount,
    InvalidArgument,
    StoreError,
    StoreUnavailable,
    TooManyBudgets,
    TooManyHolds,
    UnknownBudget,
    UnknownHold,
    shown,
)
from ktrdr_budget.models import (
    TTL_DEFAULT_S,
    HoldView,
    OnExpiry,
    Settlement,
    check_name,
    check_ttl_ms,
)
from ktrdr_budget.money import AmountIn, amount_bound, from_units, to_units
from ktrdr_budget.periods import to_ms

if TYPE_CHECKING:
    from ktrdr_budget.engine.leases.lease import LeaseBase
    from ktrdr_budget.engine.outage.prepaid import Prepaid
    from ktrdr_budget.engine.replica.hold import HoldBase
    from ktrdr_budget.engine.replica.state import Session

__all__ = ["Core"]

logger = logging.getLogger("ktrdr_budget")

_UNKNOWN = "the store does not know it: it was settled more than 24 h ago, or never granted"
_DEFERRED_MAX = 100_000
_TEXT_MAX = 256
_UNGUARDED_MAX = 10_000
_RETURNS_MAX = 1_000
_RETURN_KNOWN_MS = 1_000


class _Return(NamedTuple):
    """When a denied caller may come back, as it was looked up."""

    first_ms: int
    """The first deadline of any open hold, then."""
    at_ms: int
    deadline_ms: int


class Core(Reads):
    """Everything about a limiter that is not I/O: makes flows, and the results that they return.

    Args:
        make_hold: builds the sync or async hold object from ``(core, id, parts, ttl_ms, deadline_ms)``.
        allow: whether an unreachable store admits (P12); such spend waits in :attr:`deferred`.
        trace_id: tells the current trace, for the ledger.
    """

    def __init__(
        self,
        session: Session,
        make_hold: Callable[..., Any],
        *,
        allow: bool = False,
        trace_id: Callable[[], str] | None = None,
    ) -> None:
        super().__init__(session)
        self.make_hold = make_hold
        self.allow = allow
        self.trace_id = trace_id
        self.driver: Any = None
        """The coalescer that an async hold settles through."""
        self.runner: Any = None
        """How a sync hold runs a flow, and waits for it."""
        self.deferred: deque[Op] = deque()
        """Spend that an unreachable store has yet to be told."""
        self.deferred_doubts: dict[str, int] = {}
        """Ids of those that it may have been told all the same, and when, in milliseconds of its clock."""
        self.unresolved = Unresolved()
        """Requests whose reply was lost."""
        self.deferred_lost = 0
        """Deferred spend that had to be dropped for want of memory."""
        self.leases: set[LeaseBase] = set()
        """Those that are open."""
        self.prepaid: Prepaid | None = None
        """What an unreachable store admits from, under policy ``lease``."""
        self._returns: dict[str, _Return] = {}
        """By the keys of windows."""
        self.unguarded: OrderedDict[str, tuple[HoldBase, Record]] = OrderedDict()
        """What was admitted while the store was away: found by id here, for the store may never have heard of it."""
        self.handed: dict[str, Op] = {}
        """Of what was prepaid, what the store is to be told: how, by id."""

    def begin(self) -> Flow[None]:
        """Hears from the store, and keeps what is to be prepaid."""
        if self.prepaid is not None:
            self.prepaid.begin()
        yield from self.status([])
        yield from self.watch_policy()

    # -- reserve -------------------------------------------------------------------------------------------------------

    def reserve(
        self,
        budget: str | Mapping[str, AmountIn],
        amount: AmountIn | None,
        hold_id: str | None,
        ttl: float,
        on_expiry: OnExpiry,
        operation: str,
        owner: str,
        *,
        prepaying: bool = False,
    ) -> Flow[Any]:
        """Holds the amounts, all or none; returns a hold. What is prepaid, only the store can grant."""
        session = self.session
        wanted = self._wanted(budget, amount)
        if self.prepaid is not None:
            self.prepaid.begin()
        unnamed = hold_id is None
        hold_id = session.new_id() if hold_id is None else check_name(hold_id, "id")
        ttl_ms = check_ttl_ms(ttl)
        try:
            policy = POLICY_CODES[on_expiry]
        except (KeyError, TypeError):
            raise InvalidArgument(
                f"on_expiry must be 'charge', 'accrued' or 'release', not {shown(on_expiry)}"
            ) from None
        if self.unguarded and not unnamed and (known := self._known_here(hold_id, wanted, policy, ttl_ms)) is not None:
            return known
        # An id that was made for this request names it. The caller's own may be in use by others.
        request = "" if unnamed else session.new_id()
        labels = self._labels(owner, operation, request)
        key = session.keys.hold(hold_id)
        rounds = 0
        while True:
            parts = [(session.current_window(name), units) for name, units in wanted]
            op = Reservation(hold_id, key, ttl_ms, policy, labels, parts, session.now_ms, request)
            try:
                line, answer = yield op
            except StoreUnavailable as error:
                # Nothing else admits than a store that cannot be reached: not an error, and not one that is not ready.
                if not error.reached and not prepaying:
                    if (known := self._known_here(hold_id, wanted, policy, ttl_ms)) is not None:
                        return known  # while this waited
                    told = (owner, operation, self.trace_id() if self.trace_id else "", request)
                    if self.prepaid is not None:
                        hold = self.prepaid.admit(hold_id, wanted, ttl_ms, policy, told, ambiguous=error.ambiguous)
                        if hold is not None:
                            return hold
                    if self.allow:
                        logger.warning("hold %s is admitted unguarded: %s", hold_id, error)
                        return self._admitted_unguarded(hold_id, parts, ttl_ms, policy, told)
                if unnamed and error.ambiguous:  # it may be granted, under an id that no caller knows
                    self.give_back_later(hold_id, [window for window, _ in parts])
                raise
            if line == "g":
                deadline_ms = answer.now_us // 1000 + ttl_ms
                granted = op.granted(answer.now_us, deadline_ms)
                session.memory.granted(hold_id, op.parts, granted[0], answer.now_us)
                return self.make_hold(
                    self,
                    hold_id,
                    parts,
                    ttl_ms,
                    deadline_ms,
                    as_granted=granted,
                    request=request,
                    created_us=answer.now_us,
                )
            rounds += 1
            if line[0] == "d" and answer.due and rounds < RETIRE_ROUNDS:
                yield from self.retire(answer.due)
            elif line[0] == "p":
                record = parse_record(line[2:])
                if record.state != "o" or record.deadline_ms > answer.now_us // 1000:
                    # What was granted to this very request, by an attempt whose reply was lost, is no replay to it.
                    replayed = record.request != request
                    return self._replayed(hold_id, record, line[2:], ttl_ms, answer.now_us, replayed)
                else:
                    yield from self._retire_records({hold_id: record})
            elif line[0] == "c" and given_up(line[2:]):
                yield self._lift(hold_id, parts)
            elif line[0] != "w":
                raise (yield from self._refusal(line, hold_id, answer.now_us, op))

    def _lift(self, hold_id: str, parts: Sequence[tuple[Window, int]]) -> Op:
        """Makes an id free that was given up for another request whose caller was gone."""
        return Op(hold_id, self.session.keys.hold(hold_id), f"L {hold_id} u", [(window, ":x0") for window, _ in parts])

    def give_back(self, hold: HoldBase) -> Flow[None]:
        """Release a grant that its caller has not received, now or once the store answers again."""
        windows = [window for window, _ in hold.parts]
        op = give_back(hold.id, self.session.keys.hold(hold.id), windows, hold.request)
        try:
            line, answer = yield op
        except StoreError:
            raise
        except StoreUnavailable:
            self.give_back_later(hold.id, windows, hold.request)
        else:
            if line[0] in "kp":
                self.session.memory.acknowledged(op, line, answer.now_us // 1000)

    def give_back_later(self, hold_id: str, windows: Iterable[Window], request: str = "") -> None:
        """Release a grant that no caller has received once the store answers again; if it was not made, prevent it."""
        op = give_back(hold_id, self.session.keys.hold(hold_id), windows, request)
        self.unresolved.add(Doubt(op, "give back", self.session.now_ms() * 1000))

    def give_up(self, hold: HoldBase) -> Op:
        """Forget a grant without the store that no caller has received; return the request that may arrive yet."""
        del self.unguarded[hold.id]
        if self.prepaid is not None:
            self.prepaid.give_up(hold)
        parts = [(window, f":{units}") for window, units in hold.parts]
        return Op(hold.id, self.session.keys.hold(hold.id), f"R {hold.id}", parts, request=hold.request)

    def _admitted_unguarded(
        self, hold_id: str, parts: list[tuple[Window, int]], ttl_ms: int, policy: str, labels: tuple[str, str, str, str]
    ) -> Any:
        now_ms = self.session.now_ms()
        hold = self.make_hold(self, hold_id, parts, ttl_ms, now_ms + ttl_ms, guarded=False, request=labels[3])
        self.keep(hold, policy, labels)
        return hold

    def _known_here(self, hold_id: str, wanted: Sequence[tuple[str, int]], policy: str, ttl_ms: int) -> Any:
        """The hold of this id if it was admitted while the store was away, as it is now; ``None`` if none was (P3).

        Raises:
            HoldConflict: it was admitted with other contents.
        """
        if (known := self.unguarded.get(hold_id)) is None:
            return None
        hold, record = known
        before = sorted((segment.budget, segment.reserved) for segment in record.segments)
        if before != sorted(wanted) or record.policy != policy:
            reserved = amounts_text(
                {segment.budget: (segment.reserved, hold.unit_of(segment.budget)) for segment in record.segments}
            )
            found = f"hold {hold_id!r} was reserved at {reserved} and is {hold.state}"
            raise HoldConflict(f"{found}; its id cannot be used again with other contents", state=hold.state)
        deadline_ms = hold.deadline_ms if hold.prepaid is None else hold.prepaid.deadline_ms
        again = self.make_hold(
            self, hold_id, hold.parts, ttl_ms, deadline_ms, guarded=hold.guarded, prepaid=hold.prepaid
        )
        again.replayed, again.state, again.created_us = True, hold.state, record.created_us
        again.admitted = record
        again.adjust({w.budget: accrued for (w, _), accrued in zip(hold.parts, hold.accrued_units, strict=True)})
        return again

    def keep(self, hold: HoldBase, policy: str, labels: tuple[str, str, str, str]) -> Record:
        """Remember a hold that the store may not know by its id; ``labels``: owner, operation, trace, request."""
        segments = tuple(Segment(w.flag, w.budget, w.stored, units, 0, 0) for w, units in hold.parts)
        record = Record(
            "o", policy, hold.deadline_ms, self.session.now_ms() * 1000, 0, *labels[:3], segments, labels[3]
        )
        hold.admitted = record
        self.unguarded[hold.id] = hold, record
        if len(self.unguarded) > _UNGUARDED_MAX:
            self.unguarded.popitem(last=False)
        return record

    def _unguarded_view(self, hold_id: str) -> HoldView:
        hold, record = self.unguarded[hold_id]
        figures = zip(record.segments, hold.parts, hold.accrued_units, strict=True)
        segments = tuple(s._replace(reserved=units, accrued=accrued) for s, (_, units), accrued in figures)
        state = next(code for code, state in STATES.items() if state == hold.state)
        return record._replace(state=state, deadline_ms=to_ms(hold.expires_at), segments=segments).view(hold_id)

    def hold_view(self, hold_id: str) -> Flow[HoldView]:
        """A hold by id."""
        check_name(hold_id, "id")
        try:
            return (yield from self._read(hold_id)).view(hold_id)
        except (StoreUnavailable, UnknownHold):
            if self.prepaid is not None:
                self.prepaid.hand_over(due=True)
            if hold_id not in self.unguarded:
                raise
            return self._unguarded_view(hold_id)

    def _wanted(
        self, budget: str | Mapping[str, AmountIn], amount: AmountIn | None, *, positive: bool = True
    ) -> list[tuple[str, int]]:
        """The budgets asked for, each with its whole units."""
        if isinstance(budget, str):
            if amount is None:
                raise InvalidAmount(f"no amount given for {budget!r}")
            return [(budget, to_units(amount, self.session.budget(budget).unit, positive=positive))]
        if not isinstance(budget, Mapping) or not budget:
            raise InvalidArgument("budget must be a name, or a mapping of names to amounts")
        if amount is not None:
            raise InvalidArgument("amounts are in the mapping; give no other")
        return [
            (name, to_units(value, self.session.budget(name).unit, positive=positive)) for name, value in budget.items()
        ]

    def _replayed(self, hold_id: str, record: Record, text: str, ttl_ms: int, now_us: int, replayed: bool) -> Any:
        parts = self._parts(record)
        self.session.memory.extended(hold_id, text, [window for window, _ in parts], now_us)
        hold = self.make_hold(self, hold_id, parts, ttl_ms, record.deadline_ms, record=record, request=record.request)
        hold.replayed = replayed
        return hold

    # -- settle --------------------------------------------------------------------------------------------------------

    def settle_hold(
        self, hold: HoldBase, amounts: Sequence[tuple[str, int]] | None, remark: str = ""
    ) -> Flow[Settlement]:
        """Commits (``amounts``: mode and units of each part) or releases (``None``) a hold whose windows are known.

        A remark goes to the ledger with the current trace, after the label that the hold was reserved with.
        """
        if self.prepaid is not None and hold.prepaid is not None and not hold.prepaid.handed:
            return _at_once(self.prepaid.settle(hold, hold.prepaid, amounts, remark))
        if amounts is None:
            # What the store may not have heard of yet, it is not to open when it does.
            unheard = not hold.guarded or hold.id in self.handed
            nothing = [(window, ":x0") for window, _ in hold.parts]
            return self._settle(self._release(hold.id, nothing, "f" if unheard else "0"), hold.parts, unheard=unheard)
        if not hold.guarded:
            return self._settle(self.commit_admitted(hold, amounts, remark), hold.parts)
        parts, spent = [], []
        for (window, _), (mode, units) in zip(hold.parts, amounts, strict=True):
            parts.append((window, f":{mode}{units}"))
            spent.append(0 if window.flag == "s" else units)
        op = self._commit(hold.id, parts, remark=remark)
        if hold.as_granted is not None and not remark:
            op.simplify(self.session.replica_id, hold.as_granted, hold.parts, spent)
        return self._settle(op, hold.parts, hold=hold)

    def commit_admitted(self, hold: HoldBase, amounts: Sequence[tuple[str, int]], remark: str = "") -> Restore:
        """The commit of a hold that the store may not know: it was admitted while the store was away, or is lost."""
        session = self.session
        record = hold.admitted
        if record is None:  # lost
            record = Record("c", "c", hold.deadline_ms, hold.created_us, 0, "", "", "", ())
            asked = [units for _, units in hold.parts]
        else:
            asked = [segment.reserved for segment in record.segments]
        segments = []
        figures = zip(hold.parts, asked, hold.accrued_units, amounts, strict=True)
        for (window, reserved), base, accrued, (_, units) in figures:
            charged = 0 if window.flag == "s" else units
            grown = base if base != reserved else None
            segments.append(Segment(window.flag, window.budget, window.stored, reserved, accrued, charged, grown))
        operation, trace_id = record.operation, record.trace_id
        if remark:
            operation = f"{operation} {remark[:_TEXT_MAX]}".lstrip()
            trace_id = self.trace_id() if self.trace_id is not None else trace_id
        settled = record._replace(
            state="c", deadline_ms=hold.deadline_ms, operation=operation, trace_id=trace_id, segments=tuple(segments)
        )
        windows = [window for window, _ in hold.parts]
        return Restore(hold.id, session.keys.hold(hold.id), windows, render_record(settled))

    def _has_lost(self, hold: HoldBase) -> bool:
        """Whether a store that does not know a hold has lost it: it was granted in another timeline, and a settlement
        of it, by whomever, would be remembered yet."""
        oldest_us = (self.session.now_ms() - AGE_MAX_MS) * 1000
        return hold.granted_in != self.session.epoch and hold.created_us > oldest_us

    def settle_id(
        self, hold_id: str, amount: Amounts | None, *, release: bool = False, operator: bool = False
    ) -> Flow[Settlement]:
        """Commits or releases a hold of any process, by its id.

        Who releases an unconfirmed hold by its id need not be the worker that reserved it: that may come back yet.
        """
        check_name(hold_id, "id")
        if not release:
            check_amounts(amount)
        if hold_id in self.unguarded:
            hold, _ = self.unguarded[hold_id]
            return (yield from hold.release_flow() if release else hold.commit_flow(amount))
        asked = f"? {'operator' if operator else 'release' if release else repr(amount)}"
        prepared = Prepared(
            Op(hold_id, self.session.keys.hold(hold_id), asked, []),
            lambda record: self._settlement_of(hold_id, record, amount, release, operator),
        )
        try:
            record = yield from self._read(hold_id, prepared)
        except UnknownHold:
            if not release:
                logger.error("commit of hold %s was not recorded: %s", hold_id, _UNKNOWN)
            raise
        except StoreError:
            raise
        except StoreUnavailable:
            remembered = self.session.memory.open_hold(hold_id) if self.allow or self.prepaid is not None else None
            if remembered is None:  # to whom it was granted is not known here, nor in which windows
                raise
            record = remembered
        op = self._settlement_of(hold_id, record, amount, release, operator)
        return (yield from self._settle(op, self._parts(record)))

    def _settlement_of(
        self,
        hold_id: str,
        record: Record,
        amount: Amounts | None,
        release: bool,
        operator: bool,
    ) -> Op:
        windows = self._parts(record)
        if release:
            settled = [("x", 0)] * len(windows)
        else:
            units = {s.budget: (s.flag, s.reserved, s.accrued) for s in record.segments}
            settled = commit_modes(units, amount)
        parts = [(window, f":{mode}{units}") for (window, _), (mode, units) in zip(windows, settled, strict=True)]
        op: Op = self._release(hold_id, parts, "1" if operator else "i") if release else self._commit(hold_id, parts)
        op.record = render_record(record)
        return op

    def _commit(self, hold_id: str, parts: list[tuple[Window, str]], *, remark: str = "") -> Commit:
        trace = self._trace() if remark else "-"
        return Commit(hold_id, self.session.keys.hold(hold_id), parts, self.label(remark[:_TEXT_MAX]), trace)

    def _release(self, hold_id: str, parts: list[tuple[Window, str]], mode: str = "0") -> Op:
        return Op(hold_id, self.session.keys.hold(hold_id), f"L {hold_id} {mode}", parts)

    def _settle(
        self,
        first: Op,
        reserved: Sequence[tuple[Window, int]],
        *,
        unheard: bool = False,
        hold: HoldBase | None = None,
    ) -> Flow[Settlement]:
        """Sends a settlement.

        Args:
            unheard: it is the release of what the store may never have been told of.
            hold: it is the commit of this one, which the store has granted.
        """
        op, hold_id, parts = first, first.id, first.parts
        released = op.letter == "L"
        try:
            line, answer = yield op
            if line == "u" and not released and hold_id in self.handed:  # it has not heard of it yet
                yield self.handed[hold_id]
                line, answer = yield op
            if line == "u" and hold is not None and self._has_lost(hold):  # nor has the journal it any more
                op = self.commit_admitted(hold, [("x", units) for units in first.units])
                line, answer = yield op
        except StoreError:
            raise
        except StoreUnavailable as error:
            if not self.allow and self.prepaid is None:
                raise
            state = "released" if released else "committed"
            return self.deferral(first, state, ambiguous=error.ambiguous)
        if line == "k":  # to a simple commit
            line = first.told  # type: ignore[attr-defined]  # only a Commit is answered so
        if line[0] not in "kp":
            if line == "u" and not released:
                spent = {w.budget: from_units(u, w.unit) for (w, _), u in zip(parts, op.units, strict=True)}
                logger.error("commit of hold %s was not recorded: %s; %s", hold_id, _UNKNOWN, spent)
            if line == "u" and unheard:
                return Settlement(hold_id, "released", told_amounts(parts, ",".join("0" for _ in parts)))
            raise self._error(line, hold_id, answer.now_us, op)
        self.session.memory.acknowledged(op, line, answer.now_us // 1000)
        _, flags, told = line.split(" ")[:3]
        return Settlement(
            id=hold_id,
            state="released" if released else "committed",
            amounts=told_amounts(parts, told),
            replayed=line[0] == "p",
            overrun="o" in flags,
            overruns=_exceeded(told, reserved) if "o" in flags else (),
            late="l" in flags,
        )

    def defer_settlement(self, hold: HoldBase, amounts: Sequence[tuple[str, int]] | None) -> Settlement:
        """Settles a hold once the store answers again, whatever the policy; as :meth:`settle_hold` else."""
        if amounts is None:
            released = [(window, ":x0") for window, _ in hold.parts]
            return self.deferral(self._release(hold.id, released), "released")
        if not hold.guarded:
            return self.deferral(self.commit_admitted(hold, amounts), "committed")
        parts = [(window, f":{mode}{units}") for (window, _), (mode, units) in zip(hold.parts, amounts, strict=True)]
        return self.deferral(self._commit(hold.id, parts), "committed")

    def deferral(self, op: Op, state: Any, *, ambiguous: bool = False) -> Settlement:
        """Keeps a settlement that an unreachable store could not be told; ``ambiguous``: or was told."""
        self.defer(op)
        if (known := self.unguarded.get(op.id)) is not None:
            known[0].state = state
        if ambiguous:
            self.deferred_doubts[op.id] = self.session.now_ms()
        amounts = {w.budget: from_units(units, w.unit) for (w, _), units in zip(op.parts, op.units, strict=True)}
        return Settlement(op.id, state, amounts, deferred=True)

    def defer(self, op: Op) -> None:
        """The same of any operation."""
        if len(self.deferred) >= _DEFERRED_MAX:
            self.deferred_doubts.pop(self.deferred.popleft().id, None)
            self.deferred_lost += 1
        self.deferred.append(op)

    # -- record --------------------------------------------------------------------------------------------------------

    def record(
        self, budget: str | Mapping[str, AmountIn], amount: AmountIn | None, hold_id: str | None, operation: str
    ) -> Flow[Settlement]:
        """Spend without a reservation; never refused for lack of budget."""
        session = self.session
        wanted = self._wanted(budget, amount, positive=False)
        for name, _ in wanted:
            if session.budgets[name].kind == "slots":
                raise InvalidArgument(f"{name!r} is of kind 'slots': it can only be reserved")
        hold_id = session.new_id() if hold_id is None else check_name(hold_id, "id")
        tail = f"{self.label(operation)} {self._trace()}"
        while True:
            parts = [(session.current_window(name), f":{units}") for name, units in wanted]
            op = Op(hold_id, session.keys.hold(hold_id), f"N {hold_id} 0 {tail}", parts)
            try:
                line, answer = yield op
            except StoreError:
                raise
            except StoreUnavailable as error:
                if self.prepaid is not None and (recorded := self.prepaid.record(hold_id, wanted, tail)) is not None:
                    return recorded
                if not self.allow:
                    raise
                # Into the window in which it was spent, whenever the store returns.
                late = Op(hold_id, op.key, f"N {hold_id} 1 {tail}", parts)
                return self.deferral(late, "recorded", ambiguous=error.ambiguous)
            if line[0] in "kp":
                session.settled(op, line, answer.now_us // 1000)
                amounts = {name: from_units(units, session.budgets[name].unit) for name, units in wanted}
                return Settlement(hold_id, "recorded", amounts, replayed=line[0] == "p")
            if line[0] != "w":
                raise self._error(line, hold_id, answer.now_us, op)

    def record_later(self, hold_id: str, window: Window, units: int, operation: str) -> None:
        """Records spend in its window, whenever the store is told."""
        head = f"N {hold_id} 1 {self.label(operation)} -"
        self.defer(Op(hold_id, self.session.keys.hold(hold_id), head, [(window, f":{units}")]))

    # -- extend --------------------------------------------------------------------------------------------------------

    def extend(
        self, hold_id: str, parts: Sequence[tuple[Window, int, int]], ttl_ms: int, *, keep: bool = False
    ) -> Flow[Record]:
        """A heartbeat (or, with ``keep``, only growth) with cumulative totals: window, accrued, reserved."""
        return (yield from self._extend(hold_id, parts, ttl_ms, "1" if keep else "0"))

    def report(self, hold_id: str, parts: Sequence[tuple[Window, int, int]], ttl_ms: int) -> Flow[Record]:
        """What was used, of a hold that is left to its deadline."""
        return (yield from self._extend(hold_id, parts, ttl_ms, REPORT))

    def _extend(self, hold_id: str, parts: Sequence[tuple[Window, int, int]], ttl_ms: int, keep: str) -> Flow[Record]:
        return (yield from self.extended(self._extension(hold_id, parts, ttl_ms, keep)))[1]

    def _extension(self, hold_id: str, parts: Sequence[tuple[Window, int, int]], ttl_ms: int, keep: str) -> Op:
        tails = [(window, f":{accrued}:{reserved}") for window, accrued, reserved in parts]
        return Op(hold_id, self.session.keys.hold(hold_id), f"E {hold_id} {ttl_ms} {keep}", tails)

    def extended(self, op: Op) -> Flow[tuple[bool, Record]]:
        """The hold as an operation E has left it; false, if it changed nothing since others let the hold grow."""
        rounds = 0
        while True:
            line, answer = yield op
            if line[0] in "ea":
                record = parse_record(line[2:])
                windows = [window for window, _ in self._parts(record)]
                self.session.memory.extended(op.id, line[2:], windows, answer.now_us)
                return line[0] == "e", record
            if line[0] == "c":
                self.session.memory.seen(op.id, line[2:], answer.now_us)
            rounds += 1
            if line[0] == "u" and op.id in self.handed and rounds < RETIRE_ROUNDS:
                yield self.handed[op.id]  # it has not heard of it yet
                continue
            if line[0] != "d" or not answer.due or rounds == RETIRE_ROUNDS:
                raise (yield from self._refusal(line, op.id, answer.now_us, op))
            yield from self.retire(answer.due)

    def extend_id(self, hold_id: str, ttl: float | None, accrued: Amounts | None) -> Flow[HoldView]:
        """A heartbeat by id; ``accrued`` is the total so far. Without a ttl, no deadline comes sooner for it."""
        ttl_ms = check_ttl_ms(TTL_DEFAULT_S if ttl is None else ttl)
        check_name(hold_id, "id")
        check_amounts(accrued)
        if hold_id in self.unguarded:
            hold, _ = self.unguarded[hold_id]
            hold.accrue_to(accrued)
            yield from hold.extend_flow(ttl)
            return self._unguarded_view(hold_id)

        def used(record: Record) -> list[tuple[Window, int, int]]:
            given = spread(accrued, {s.budget: s.flag for s in record.segments}) if accrued is not None else {}
            return [(w, given.get(w.budget, 0), 0) for w, _ in self._parts(record)]

        prepared = None if accrued is None else Prepared(
            Op(hold_id, self.session.keys.hold(hold_id), f"? {accrued!r}", []),
            lambda record: self._extension(hold_id, used(record), ttl_ms, REPORT),
        )  # fmt: skip
        record = yield from self._read(hold_id, prepared)
        return (yield from self._extend(hold_id, used(record), ttl_ms, "2" if ttl is None else "0")).view(hold_id)

    def grow_id(self, hold_id: str, amounts: Mapping[str, AmountIn], ttl: float) -> Flow[HoldView]:
        """Raises the reservation to new totals, by id, in all budgets or in none; never lowers it."""
        ttl_ms = check_ttl_ms(ttl)
        check_name(hold_id, "id")
        check_amounts(amounts)
        if hold_id in self.unguarded:
            hold, _ = self.unguarded[hold_id]
            yield from hold.grow_to_flow(amounts)
            return self._unguarded_view(hold_id)
        record = yield from self._read(hold_id)
        given = spread(amounts, {s.budget: s.flag for s in record.segments})
        parts = [(w, 0, given.get(w.budget, 0)) for w, _ in self._parts(record)]
        return (yield from self.extend(hold_id, parts, ttl_ms, keep=True)).view(hold_id)

    # -- errors --------------------------------------------------------------------------------------------------------

    def _refusal(self, line: str, hold_id: str, now_us: int, op: Op) -> Flow[Exception]:
        """The exception for a reply that is no success, a denial included."""
        if line[0] != "d":
            return self._error(line, hold_id, now_us, op)
        _, name, *figures = line.split(" ")
        window = next(window for window, _ in op.parts if window.name == name)
        budget = self.session.budgets.get(window.budget)
        unit = budget.unit if budget else window.unit
        denied = denial(window, figures, now_us, unit)
        if denied.reason == "budget_held" and figures[5] != "0":
            figures[5] = str((yield from self._first_return_ms(window, op, int(figures[5]), now_us // 1000)))
            denied = denial(window, figures, now_us, unit)
        return BudgetExceeded(denied)

    def _first_return_ms(self, window: Window, op: Op, first_ms: int, now_ms: int) -> Flow[int]:
        """When waiting may help; ``first_ms``: as the store tells, perhaps of another budget's hold, or of this one.

        It is looked up once for all that are denied within a second, unless another hold has come first meanwhile.
        """
        if op.letter != "R":
            return (yield from self.first_return_ms(window, op.id, now_ms))
        told = self._returns.get(window.key)
        if told is None or told.first_ms != first_ms or not 0 <= now_ms - told.at_ms < _RETURN_KNOWN_MS:
            if len(self._returns) >= _RETURNS_MAX:
                self._returns.clear()
            # Who is denied while it is being looked up is told what the store has told.
            self._returns[window.key] = _Return(first_ms, now_ms, first_ms)
            found_ms = yield from self.first_return_ms(window, op.id, now_ms)
            self._returns[window.key] = told = _Return(first_ms, now_ms, found_ms)
        return told.deadline_ms

    def _error(self, line: str, hold_id: str, now_us: int, op: Op) -> Exception:
        """The exception for any other reply that is no success."""
        match line[0]:
            case "c":
                record = parse_record(line[2:])
                message = conflict_message(hold_id, record, op.letter, self.session.budgets)
                obeyed = record.state == "z" and op.letter == "E"
                return HoldConflict(message, state=STATES[record.state], released_by_operator=obeyed)
            case "m":
                _, name, registered = line.split(" ")
                budget = self.session.budgets.get(name)
                if op.letter == "R" or op.letter == "N" or (budget and budget.definition != registered):
                    return conflict(self.session.budget(name), registered)
                return outdated(hold_id, name, registered)
            case "h":
                _, count, deadline_ms = line.split(" ")
                seconds = max(1, -((now_us - int(deadline_ms) * 1000) // 1_000_000)) if int(deadline_ms) else None
                many = f"tenant {self.session.tenant!r} has {count} open and unconfirmed holds"
                return TooManyHolds(f"{many}; it may have {self.session.max_holds}", retry_after=seconds)
            case "b":
                most = f"tenant {self.session.tenant!r} has as many budgets as it may: {self.session.max_budgets}"
                return TooManyBudgets(f"{most}; {line[2:].rpartition(':')[0]!r} would be another")
            case "f":
                name, _ = split_name(line[2:])
                unit = next((window.unit for window, _ in op.parts if window.name == line[2:]), "count")
                bound = amount_bound(self.session.budgets[name].unit if name in self.session.budgets else unit, 2**62)
                return InvalidAmount(f"{name!r} would count {bound} or more in this window; nothing was written")
            case "q":
                name, _ = split_name(line[2:])
                return UnknownBudget(
                    f"the limit of {name!r} is known neither to this limiter nor to the store; nothing was granted"
                )
            case "u":
                return UnknownHold(f"unknown hold {hold_id!r}")
            case "y":
                return StoreError(f"hold {hold_id!r}: {line[2:]}")
        return StoreError(f"unexpected answer to {op.head.split(' ')[0]!r} for {hold_id!r}")

    def _labels(self, owner: str, operation: str, request: str) -> str:
        if not owner and not operation and self.trace_id is None:
            return f"-!{request} - -" if request else "- - -"
        return f"{owner_word(self.label(owner), request)} {self.label(operation)} {self._trace()}"

    def _trace(self) -> str:
        return "-" if self.trace_id is None else self.label(self.trace_id())

    def label(self, text: str) -> str:
        """A label for the ledger, as one word."""
        if not text:
            return "-"
        if not isinstance(text, str) or len(text) > _TEXT_MAX:
            raise InvalidArgument(f"a label is a string of at most {_TEXT_MAX} characters")
        try:
            return word(text)
        except UnicodeEncodeError:
            raise InvalidArgument(f"a label must be text that UTF-8 can say, not {shown(text)}") from None


def _at_once(settlement: Settlement) -> Flow[Settlement]:
    """A flow that asks nothing."""
    return settlement
    yield


def _exceeded(told: str, reserved: Sequence[tuple[Window, int]]) -> tuple[str, ...]:
    """The budgets in which more was committed than reserved."""
    committed = map(int, told.split(","))
    return tuple(window.budget for (window, held), units in zip(reserved, committed, strict=True) if units > held)
