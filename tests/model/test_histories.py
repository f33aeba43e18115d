"""Random histories on a real server with a movable clock: every reply is what the reference model predicts.

A failure prints the history and a blob to reproduce it. ``KTRDR_EXAMPLES`` sets how many histories are tried.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
from collections.abc import Mapping
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, assume, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetError, InvalidAmount

from .histories import (
    BUDGETS,
    BY_NAME,
    STARTS,
    UNCAPPED,
    amount_for,
    count_limits,
    mapping_for,
    names_of_a_hold,
    new_ids,
    policies,
    requests,
    steps_s,
    ttls,
    usd_limits,
    usual,
)
from .observed import RawStore, agree, all_units, fields, retry_after_agrees
from .reference import CLOSED, Grant, Reference, Refused, Settled, Worker, units_of

EXAMPLES = int(os.environ.get("KTRDR_EXAMPLES", "40"))
STEPS = int(os.environ.get("KTRDR_STEPS", "40"))
STATUS_FIELDS = (
    *("window", "resets_at", "limit", "spent", "held", "unconfirmed", "remaining", "events", "overruns"),
    *("limit_source", "limit_until", "configured_limit"),
)
VIEW_FIELDS = (
    *("id", "state", "amounts", "accrued", "charged", "windows", "on_expiry", "created_at", "expires_at"),
    *("operation", "released_by_operator"),
)
DENIAL_FIELDS = ("budget", "reason", "limit", "spent", "held", "unconfirmed", "remaining", "requested", "fits")
SETTLED_FIELDS = ("state", "amounts", "replayed", "overrun", "late")

replicas = st.integers(0, 2)
configured = st.fixed_dictionaries(
    {b.name: st.none() if b.name == UNCAPPED else usd_limits if b.unit == "usd" else count_limits for b in BUDGETS}
)
scalars = amount_for("agent", zero=True)


class Histories(RuleBasedStateMachine):
    """The real system beside the model; each rule does one call on both."""

    ids = Bundle("ids")
    holds = Bundle("holds")

    def __init__(self, server, runner: asyncio.Runner) -> None:
        super().__init__()
        self.server, self.runner = server, runner
        self.client = server.client()
        self.client.flushall()
        self.limiters: list[AsyncBudgetLimiter] = []
        self.model: Reference

    def teardown(self) -> None:
        try:
            if self.limiters:
                self.read_everything(0, 1000)
        finally:
            for limiter in self.limiters:
                self.runner.run(limiter.close())
            self.client.close()

    @initialize(start=st.sampled_from(STARTS), limits=configured)
    def begin(self, start, limits):
        self.server.set(start, frozen=True)
        self.model = Reference(BUDGETS, int(start.timestamp() * 1000))
        self._start_replica(limits)

    def _start_replica(self, limits) -> None:
        budgets = [
            Budget(b.name, limits[b.name], b.unit, b.period, b.timezone, "slots" if b.slots else "spend")
            for b in BUDGETS
        ]
        limiter = AsyncBudgetLimiter(self.server.url, budgets, timeout=30)
        self.runner.run(limiter.start())
        self.limiters.append(limiter)
        self.model.configured.append(
            {b.name: None if limits[b.name] is None else units_of(limits[b.name], b.unit, down=True) for b in BUDGETS}
        )

    def _replica(self, number: int) -> tuple[int, AsyncBudgetLimiter]:
        number %= len(self.limiters)
        return number, self.limiters[number]

    # -- both sides of a call ------------------------------------------------------------------------------------------

    def _real(self, call):
        """The reply, or the error that refused."""
        try:
            return self.runner.run(call)
        except BudgetError as error:
            return error

    def _alike(self, real, expect):
        """Compares a real reply with what the model's call returns; returns both."""
        try:
            model = expect()
        except Refused as refused:
            model = refused
        note(f"# {str(real)[:150]}")
        if isinstance(model, Refused):
            assert type(real).__name__ == model.kind, (real, model)
            if model.kind == "BudgetExceeded":
                expected = dict(model.figures)
                waits_ms = expected.pop("retry_after_ms")
                agree(self._denied(real, expected), expected)
                assert retry_after_agrees(real.retry_after, waits_ms), (real.retry_after, waits_ms, model)
        elif isinstance(real, BudgetError):
            raise AssertionError(f"expected {model!r}") from real
        elif isinstance(model, Settled):
            agree(fields(real, SETTLED_FIELDS), {name: getattr(model, name) for name in SETTLED_FIELDS})
        elif isinstance(model, Grant):
            view = self.model.view(model.hold.id)
            shown = {name: view[name] for name in ("id", "state", "amounts", "accrued", "windows", "expires_at")}
            agree(
                {**fields(real, shown), "replayed": real.replayed, "guarded": real.guarded},
                {**shown, "replayed": model.replayed, "guarded": True},
            )
        return real, model

    @staticmethod
    def _denied(real, expected: dict) -> dict:
        """A denial's figures; what a window has above 2**53, where it is closed, is told to a few units."""
        told = fields(real, DENIAL_FIELDS)
        for name in ("spent", "held", "unconfirmed"):
            if expected[name] > CLOSED and abs(told[name] - expected[name]) <= 4:
                told[name] = expected[name]
        return told

    def _units(self, amounts: Mapping) -> dict[str, int]:
        return {name: units_of(amount, BY_NAME[name].unit) for name, amount in amounts.items()}

    def _amounts(self, given, names):
        """What the model is told: None, whole units of a scalar, or a mapping of them."""
        if given is None or isinstance(given, Mapping):
            return given if given is None else self._units(given)
        return units_of(given, "usd" if any(BY_NAME[name].unit == "usd" for name in names) else "count")

    def _names(self, id: str) -> list[str]:
        hold = self.model.holds.get(id)
        return list(hold.parts) if hold else ["agent"]

    def _draw_amounts(self, data, names, *, none: bool = True):
        """Nothing, a scalar where it is unambiguous, or a mapping of some of the budgets."""
        kinds = [mapping_for(data.draw(st.lists(st.sampled_from(names), unique=True)), zero=True)]
        if any(BY_NAME[name].unit == "usd" for name in names):
            kinds.append(scalars)
        elif sum(not BY_NAME[name].slots for name in names) == 1:
            kinds.append(st.integers(0, 9))
        if none:
            kinds.append(st.none())
        return data.draw(st.one_of(kinds), label="amounts")

    # -- reserve and record --------------------------------------------------------------------------------------------

    @rule(target=holds, number=replicas, amounts=requests, id=new_ids, ttl=ttls, policy=policies)
    def reserve(self, number, amounts, id, ttl, policy):
        return self._reserve(number, amounts, id, ttl, policy)

    def _reserve(self, number, amounts, id, ttl, policy):
        number, limiter = self._replica(number)
        real = self._real(limiter.reserve(amounts, id=id, ttl=ttl, on_expiry=policy, operation=f"for {id}"))
        return self._granted(number, real, amounts, id, ttl, policy)

    def _granted(self, number, real, amounts, id, ttl, policy):
        ttl_ms, wanted = int(ttl * 1000), self._units(amounts)
        real, model = self._alike(real, lambda: self.model.reserve(number, wanted, id, ttl_ms, policy, f"for {id}"))
        if not isinstance(model, Grant):
            return multiple()
        if not model.replayed:
            self._check_hard_cap(model)
        return real, self.model.worker(model, ttl_ms)

    def _check_hard_cap(self, grant: Grant) -> None:
        store = RawStore(self.client)
        for name, part in grant.hold.parts.items():
            limit = self.model.limit(part.window)
            assert limit is None or sum(store.sums(f"{name}:{part.window.name}").values()) <= limit

    @rule(target=holds, number=replicas, hold=holds, ttl=ttls, other=st.booleans(), data=st.data())
    def reserve_again(self, number, hold, ttl, other, data):
        """The same id: with the same contents in another order, or with something else."""
        known = self.model.holds.get(hold[1].id)
        assume(known is not None)
        asked = {name: self._written(name, part.asked) for name, part in known.parts.items()}
        assume(all(part.asked for part in known.parts.values()))
        amounts = {name: asked[name] for name in data.draw(st.permutations(list(asked)), label="order")}
        if other:
            amounts[data.draw(st.sampled_from(list(asked)), label="other")] = 1
        return self._reserve(number, amounts, known.id, ttl, known.on_expiry)

    @staticmethod
    def _written(name: str, units: int):
        return units if BY_NAME[name].unit != "usd" else f"{units}e-9"

    @rule(number=replicas, batch=st.lists(st.tuples(requests, new_ids, ttls, policies), min_size=2, max_size=5))
    def reserve_at_once(self, number, batch):
        self._reserve_at_once(number, batch)

    @rule(number=replicas, one=st.tuples(requests, new_ids, ttls, policies), times=st.integers(2, 6))
    def reserve_in_duplicate(self, number, one, times):
        self._reserve_at_once(number, [one] * times)

    def _granted_at_once(self, number, real, amounts, id, ttl, policy):
        wanted = self._units(amounts)
        self._alike(real, lambda: self.model.reserve(number, wanted, id, int(ttl * 1000), policy, f"for {id}"))

    def _reserve_at_once(self, number, batch):
        """One of the orders in which the store may have decided explains all replies.

        It is the given one unless some had to ask again: a window had ended, or holds that were due stood in the way.
        """
        number, limiter = self._replica(number)

        async def together():
            calls = [
                limiter.reserve(amounts, id=new, ttl=ttl, on_expiry=policy, operation=f"for {new}")
                for amounts, new, ttl, policy in batch
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

        replies = self.runner.run(together())
        before = copy.deepcopy(self.model)
        failures = []
        for order in itertools.islice(itertools.permutations(range(len(batch))), 720):
            try:
                for place in order:
                    self._granted_at_once(number, replies[place], *batch[place])
                if failures:
                    self._learn_limits(number, batch)
                return
            except AssertionError as error:
                failures.append(error)
                self.model = copy.deepcopy(before)
        raise failures[0]

    def _learn_limits(self, number: int, batch) -> None:
        """What asked again had been denied before, unseen, and a denial passes on a limit that changed."""
        for name in {name for amounts, *_ in batch for name in amounts}:
            window = self.model.window(name)
            limit = self.model.configured[number][name]
            stored = self.client.hget(f"ktrdr:{{default}}:w:{name}:{window.name}", "limit")
            if window.asserted_by >= 0 and stored == ("-" if limit is None else str(limit)):
                self.model.assert_limit(window, number)

    @rule(target=ids, number=replicas, names=names_of_a_hold, id=new_ids, data=st.data())
    def record(self, number, names, id, data):
        names = [name for name in names if not BY_NAME[name].slots]
        assume(names)
        amounts = data.draw(mapping_for(names, zero=True), label="amounts")
        real = self._real(self._replica(number)[1].record(amounts, id=id, operation="by hand"))
        self._alike(real, lambda: self.model.record(self._units(amounts), id, "by hand"))
        return id

    # -- by id ---------------------------------------------------------------------------------------------------------

    @rule(target=ids, id=new_ids)
    def some_id(self, id):
        return id

    @rule(number=replicas, id=ids, data=st.data())
    def commit(self, number, id, data):
        names = self._names(id)
        given = self._draw_amounts(data, names)
        real = self._real(self._replica(number)[1].commit(id, given))
        self._alike(real, lambda: self.model.commit(id, self._amounts(given, names)))

    @rule(number=replicas, id=ids, operator=st.booleans())
    def release(self, number, id, operator):
        real = self._real(self._replica(number)[1].release(id, operator=operator))
        self._alike(real, lambda: self.model.release(id, operator=operator))

    @rule(number=replicas, id=ids, ttl=ttls, data=st.data())
    def extend(self, number, id, ttl, data):
        names = self._names(id)
        given = self._draw_amounts(data, names)
        real = self._real(self._replica(number)[1].extend(id, ttl, accrued=given))
        accrued = self._amounts(given, names)
        accrued = None if accrued is None else self.model.spread(names, accrued)
        self._extended(real, lambda: self.model.extend(id, int(ttl * 1000), accrued))

    @rule(number=replicas, id=ids, ttl=ttls, data=st.data())
    def grow(self, number, id, ttl, data):
        names = self._names(id)
        totals = data.draw(mapping_for(data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))))
        real = self._real(self._replica(number)[1].grow(id, totals, ttl=ttl))
        self._extended(real, lambda: self.model.extend(id, int(ttl * 1000), totals=self._units(totals)))

    def _extended(self, real, expect) -> None:
        real, model = self._alike(real, expect)
        if not isinstance(model, Refused):
            agree(fields(real, VIEW_FIELDS), self.model.view(model.id))

    # -- with the hold object ------------------------------------------------------------------------------------------

    def _mine(self, hold):
        """A hold object, unless its id was forgotten and means another hold by now."""
        worker: Worker = hold[1]
        known = self.model.holds.get(worker.id)
        assume(known is None or known.serial == worker.serial)
        return hold

    @rule(hold=holds, data=st.data())
    def accrue(self, hold, data):
        real, worker = self._mine(hold)
        given = self._draw_amounts(data, list(worker.reserved), none=False)
        more = self.model.spread(worker.reserved, self._amounts(given, worker.reserved))
        sums = {name: worker.accrued[name] + units for name, units in more.items()}
        if max(sums.values(), default=0) >= CLOSED:
            with pytest.raises(InvalidAmount):
                real.accrue(given)
            return
        real.accrue(given)
        worker.accrued |= sums

    @rule(hold=holds, ttl=st.one_of(st.none(), ttls))
    def heartbeat(self, hold, ttl):
        real, worker = self._mine(hold)
        ttl_ms = worker.ttl_ms if ttl is None else int(ttl * 1000)
        error = self._real(real.extend(ttl))
        if self._worker_extended(error, real, worker, lambda: self.model.extend(worker.id, ttl_ms, worker.accrued)):
            worker.ttl_ms = ttl_ms

    @rule(hold=holds, data=st.data())
    def grow_mine(self, hold, data):
        real, worker = self._mine(hold)
        given = self._draw_amounts(data, list(worker.reserved), none=False)
        more = self.model.spread(worker.reserved, self._amounts(given, worker.reserved))
        totals = {name: units + more.get(name, 0) for name, units in worker.reserved.items()}
        error = self._real(real.grow(given))
        if max(totals.values()) >= CLOSED:
            assert isinstance(error, InvalidAmount)
            return
        self._worker_extended(error, real, worker, lambda: self.model.extend(worker.id, worker.ttl_ms, totals=totals))

    def _worker_extended(self, error, real, worker: Worker, expect) -> bool:
        _, model = self._alike(error, expect)
        if isinstance(model, Refused):
            return False
        assert error is None
        view = self.model.view(model.id)
        worker.reserved = view["amounts"]
        agree(fields(real, ("amounts", "expires_at")), {name: view[name] for name in ("amounts", "expires_at")})
        return True

    @rule(hold=holds, data=st.data())
    def commit_mine(self, hold, data):
        real, worker = self._mine(hold)
        given = self._draw_amounts(data, list(worker.reserved))
        reply = self._real(real.commit(given))
        amounts = self._amounts(given, worker.reserved)
        self._alike(reply, lambda: self.model.commit_mine(worker, amounts))

    @rule(hold=holds)
    def release_mine(self, hold):
        real, worker = self._mine(hold)
        self._alike(self._real(real.release()), lambda: self.model.release_mine(worker))

    # -- limits, time, reads -------------------------------------------------------------------------------------------

    @rule(number=replicas, name=usual, data=st.data())
    def set_limit(self, number, name, data):
        number, limiter = self._replica(number)
        limit = data.draw(usd_limits if BY_NAME[name].unit == "usd" else count_limits, label="limit")
        until = data.draw(st.sampled_from([None, None, "window", 30, 7200, 100_000]), label="until")
        until_ms = until
        if isinstance(until, int):
            until = self.server.frozen_at + timedelta(seconds=until)
            until_ms = int(until.timestamp() * 1000)
        units = None if limit is None else units_of(limit, BY_NAME[name].unit, down=True)
        reply = self.runner.run(limiter.set_limit(name, limit, until))
        self.model.set_limit(name, units, until_ms)
        agree(fields(reply, STATUS_FIELDS), self.model.status(number, name))

    @rule(number=replicas, name=usual)
    def clear_limit(self, number, name):
        number, limiter = self._replica(number)
        reply = self.runner.run(limiter.clear_limit(name))
        self.model.clear_limit(name)
        agree(fields(reply, STATUS_FIELDS), self.model.status(number, name))

    @rule(seconds=steps_s)
    def wait(self, seconds):
        self._advance(int(seconds * 1000))

    @rule(after=st.booleans())
    def wait_for_the_next_event(self, after):
        """To half a second before or after the next deadline, midnight or the like."""
        later = [at for at in self.model.instants() if at > self.model.now_ms + 600]
        self._advance(min(later) - self.model.now_ms + (500 if after else -500))

    def _advance(self, milliseconds: int) -> None:
        # Nothing may happen within the noise of the clock.
        while any(abs(self.model.now_ms + milliseconds - at) < 100 for at in self.model.instants()):
            milliseconds += 200
        self.model.advance(milliseconds)
        self.server.advance(milliseconds / 1000)

    @precondition(lambda self: len(self.limiters) < 3)
    @rule(limits=configured)
    def start_another_replica(self, limits):
        self._advance(1000)
        self._start_replica(limits)

    @rule(number=replicas, name=usual)
    def read_status(self, number, name):
        number, limiter = self._replica(number)
        agree(fields(self.runner.run(limiter.status(name)), STATUS_FIELDS), self.model.status(number, name))

    @rule(number=replicas, page=st.sampled_from([1, 2, 3, 1000]))
    def read_everything(self, number, page):
        number, limiter = self._replica(number)
        for status in self.runner.run(limiter.statuses()):
            agree(fields(status, STATUS_FIELDS), self.model.status(number, status.budget))
        for name in BY_NAME:
            self._compare_holds(limiter, name, page)
        for (name, window), known in self.model.windows.items():
            entries = self._pages(lambda cursor, n=name, w=window: limiter.ledger(n, w, limit=page, cursor=cursor))
            assert [entry.at for entry in entries] == sorted((entry.at for entry in entries), reverse=True)
            real = [(e.kind, e.hold_id, *all_units({"": e.amount}).values(), e.operation) for e in entries]
            assert sorted(real) == sorted(known.ledger), (name, window)
        for known in [f"op_{number}" for number in range(12)]:
            real, model = self._alike(self._real(limiter.get(known)), lambda known=known: self.model.view(known))
            if not isinstance(model, Refused):
                agree(fields(real, VIEW_FIELDS), model)

    def _compare_holds(self, limiter, name: str, page: int) -> None:
        real = [fields(v, VIEW_FIELDS) for v in self._pages(lambda c: limiter.holds(name, limit=page, cursor=c))]
        model = self.model.listed(name)
        assert [view["state"] for view in real] == [view["state"] for view in model], (name, real, model)
        by_id = {view["id"]: view for view in model}
        assert len(real) == len(by_id)
        for view in real:
            agree(view, by_id[view["id"]])
        deadlines = [view["expires_at"] for view in real if view["state"] == "open"]
        assert deadlines == sorted(deadlines, reverse=True)

    def _pages(self, read) -> list:
        found, cursor = [], None
        while True:
            page = self.runner.run(read(cursor))
            found += page
            cursor = page.next_cursor
            if cursor is None:
                return found

    @invariant()
    def the_store_keeps_its_promises(self):
        store = RawStore(self.client)
        store.check_it_adds_up()
        store.check_keys_expire()


def test_random_histories_go_as_the_model_says(clocked_server, runner):
    profile = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=False,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run(lambda: Histories(clocked_server, runner), settings=profile)
