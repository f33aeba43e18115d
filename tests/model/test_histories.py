"""Random histories on a real server with a settable clock: each reply agrees with the reference model.

A failure prints the history and a blob to reproduce it. ``KTRDR_EXAMPLES`` sets the number of histories,
``KTRDR_STEPS`` their length.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ktrdr_budget import BudgetError, InvalidAmount

from .histories import (
    BY_NAME,
    NEW_IDS,
    STARTS,
    Choice,
    choices,
    configured_limits,
    count_limits,
    impossible_reservations,
    mapping_for,
    new_ids,
    policies,
    requests,
    spends,
    steps_s,
    ttls,
    usd_limits,
    usual,
)
from .observed import agree, fields
from .pair import STATUS_FIELDS, Call, Pair, amounts_in_units, units_by_name
from .reference import CLOSED, Grant, Refused, Worker, units_of

EXAMPLES = int(os.environ.get("KTRDR_EXAMPLES", "100"))
STEPS = int(os.environ.get("KTRDR_STEPS", "40"))

numbers = st.integers(0, 2)
places = st.integers(0, 99)
changes = st.sampled_from(["commit", "commit", "release", "extend", "grow"])
kinds = st.sampled_from(["reserve", "record", "commit", "release", "extend", "grow"])
reservations = st.tuples(requests, new_ids, ttls, policies)


class Left(Exception):
    """An error that ends a block of `limiter.hold`."""


class Histories(RuleBasedStateMachine):
    """A state machine whose rules make each call on the real system and on the model.

    The order in which the store decides concurrent calls differs from run to run. So no draw depends on a reply:
    Hypothesis repeats the beginnings of histories, and reports a fault of the test if the draws then differ.
    """

    ids = Bundle("ids")
    pair: Pair | None = None

    def __init__(self, server, runner: asyncio.Runner) -> None:
        super().__init__()
        self.server, self.runner = server, runner
        self.granted: list = []
        """The granted holds, each with its model, in order."""

    @initialize(start=st.sampled_from(STARTS), limits=configured_limits)
    def begin(self, start, limits):
        self.pair = Pair(self.server, self.runner, start)
        self.pair.start_replica(limits)

    def teardown(self) -> None:
        if self.pair is not None:
            try:
                self.read_everything(0, 1000)
            finally:
                self.pair.close()

    @property
    def model(self):
        return self.pair.model

    @invariant()
    def check_store(self):
        if self.pair is not None:
            self.pair.check_store()

    def _replica(self, number: int) -> int:
        return number % len(self.pair.limiters)

    def _names(self, id: str) -> list[str]:
        hold = self.model.holds.get(id)
        return list(hold.parts) if hold else ["agent"]

    def _hold(self, place: int):
        """The granted hold at a place; place 0 is the latest. None if the store has given its id to another hold."""
        if not self.granted:
            return None
        real, worker = self.granted[-1 - place % len(self.granted)]
        known = self.model.holds.get(worker.id)
        return (real, worker) if known is None or known.serial == worker.serial else None

    # -- reserve and record --------------------------------------------------------------------------------------------

    def _reservation(self, number, amounts, id, ttl, policy) -> Call:
        wanted, operation = units_by_name(amounts), f"for {id}"
        return Call(
            number,
            lambda limiter: limiter.reserve(amounts, id=id, ttl=ttl, on_expiry=policy, operation=operation),
            lambda: self.model.reserve(number, wanted, id, int(ttl * 1000), policy, operation),
            tuple(wanted),
        )

    def _reserve(self, number, amounts, id, ttl, policy):
        call = self._reservation(self._replica(number), amounts, id, ttl, policy)
        real, model = self.pair.both(call.replica, call.make, call.expect)
        if isinstance(model, Grant):
            if not model.replayed:
                self.pair.check_hard_cap(model.hold)
            self.granted.append((real, self.model.worker(model, int(ttl * 1000))))

    @rule(number=numbers, one=reservations)
    def reserve(self, number, one):
        self._reserve(number, *one)

    @rule(number=numbers, place=places, ttl=ttls, order=st.permutations(list(BY_NAME)), other=st.booleans())
    def reserve_again(self, number, place, ttl, order, other):
        """Reserve with a known id: with the same amounts in another order, or with other amounts."""
        hold = self._hold(place)
        known = hold and self.model.holds.get(hold[1].id)
        if not known or not all(part.requested for part in known.parts.values()):
            return
        written = {n: p.requested if BY_NAME[n].unit != "usd" else f"{p.requested}e-9" for n, p in known.parts.items()}
        amounts = {name: written[name] for name in order if name in written}
        if other:
            amounts[next(iter(amounts))] = 1
        self._reserve(number, amounts, known.id, ttl, known.on_expiry)

    @rule(number=numbers, refused=impossible_reservations)
    def reserve_invalid(self, number, refused):
        amounts, options, kind = refused
        error = self.pair.real(self.pair.limiters[self._replica(number)].reserve(amounts, **options))
        assert type(error).__name__ == kind, error

    @rule(number=numbers)
    def reserve_many(self, number):
        """Make more holds than one reply can list as due."""
        number, serial = self._replica(number), self.model.grants
        for place in range(40):
            call = self._reservation(number, {"open-ended": "0.0000001"}, f"many_{serial}_{place}", 61, "release")
            self.pair.both(call.replica, call.make, call.expect)

    @rule(target=ids, number=numbers, amounts=spends, id=new_ids)
    def record(self, number, amounts, id):
        call = self._record(self._replica(number), amounts, id)
        self.pair.both(call.replica, call.make, call.expect)
        return id

    def _record(self, number, amounts, id) -> Call:
        return Call(
            number,
            lambda limiter: limiter.record(amounts, id=id, operation="by hand"),
            lambda: self.model.record(units_by_name(amounts), id, "by hand"),
        )

    # -- by id ---------------------------------------------------------------------------------------------------------

    @rule(target=ids, id=new_ids)
    def some_id(self, id):
        return id

    @rule(number=numbers, id=ids, kind=changes, choice=choices, ttl=ttls)
    def change_by_id(self, number, id, kind, choice, ttl):
        call = self._change(self._replica(number), id, kind, choice, ttl)
        self.pair.both(call.replica, call.make, call.expect)

    def _change(self, number, id, kind, choice: Choice, ttl) -> Call:
        return getattr(self, f"_{kind}")(number, id, self._names(id), choice, ttl)

    def _commit(self, number, id, names, choice: Choice, _ttl) -> Call:
        given = choice.amounts(names)
        amounts = amounts_in_units(given, names)
        return Call(number, lambda limiter: limiter.commit(id, given), lambda: self.model.commit(id, amounts))

    def _release(self, number, id, _names, choice: Choice, _ttl) -> Call:
        return Call(
            number,
            lambda limiter: limiter.release(id, operator=choice.operator),
            lambda: self.model.release_by_id(id, operator=choice.operator),
        )

    def _extend(self, number, id, names, choice: Choice, ttl) -> Call:
        given = choice.amounts(names)
        accrued = {} if given is None else self.model.spread(names, amounts_in_units(given, names))
        return Call(
            number,
            lambda limiter: limiter.extend(id, ttl, accrued=given),
            lambda: self.model.extend(id, int(ttl * 1000), accrued),
        )

    def _grow(self, number, id, names, choice: Choice, ttl) -> Call:
        totals = choice.totals(names)
        return Call(
            number,
            lambda limiter: limiter.grow(id, totals, ttl=ttl),
            lambda: self.model.extend(id, int(ttl * 1000), totals=units_by_name(totals), keep=True),
        )

    # -- concurrently --------------------------------------------------------------------------------------------------

    @rule(number=numbers, one=reservations, times=st.integers(2, 6))
    def reserve_in_duplicate(self, number, one, times):
        self.pair.at_once([self._reservation(self._replica(number), *one)] * times)

    @rule(number=numbers, batch=st.lists(reservations, min_size=2, max_size=5))
    def reserve_at_once(self, number, batch):
        self.pair.at_once([self._reservation(self._replica(number), *one) for one in batch])

    @rule(wanted=st.lists(st.tuples(kinds, numbers, reservations, choices), min_size=2, max_size=4))
    def change_at_once(self, wanted):
        """Make concurrent settlements, records, growth and reservations by any replica."""
        calls = []
        for kind, number, (amounts, known, ttl, policy), choice in wanted:
            replica = self._replica(number)
            if kind == "reserve":
                calls.append(self._reservation(replica, amounts, known, ttl, policy))
            elif kind == "record":
                calls.append(self._record(replica, {"agent": choice.usd}, known))
            elif known in self.model.holds:
                calls.append(self._change(replica, known, kind, choice, ttl))
        self.pair.at_once(calls)

    # -- with the hold object ------------------------------------------------------------------------------------------

    @rule(place=places, choice=choices)
    def accrue(self, place, choice):
        if hold := self._hold(place):
            real, worker = hold
            self._accrue(real, worker, choice.amounts(worker.reserved, none=False))

    def _accrue(self, real, worker: Worker, given) -> None:
        more = self.model.spread(worker.reserved, amounts_in_units(given, worker.reserved))
        sums = {name: worker.accrued[name] + units for name, units in more.items()}
        if max(sums.values(), default=0) >= CLOSED:
            with pytest.raises(InvalidAmount):
                real.accrue(given)
        else:
            real.accrue(given)
            worker.accrued |= sums

    @rule(place=places, ttl=st.one_of(st.none(), ttls))
    def heartbeat(self, place, ttl):
        if hold := self._hold(place):
            real, worker = hold
            ttl_ms = worker.ttl_ms if ttl is None else int(ttl * 1000)
            reply = self.pair.real(real.extend(ttl))
            if self._extended(reply, real, worker, lambda: self.model.extend(worker.id, ttl_ms, worker.accrued)):
                worker.ttl_ms = ttl_ms

    @rule(place=places, choice=choices)
    def grow_mine(self, place, choice):
        if not (hold := self._hold(place)):
            return
        real, worker = hold
        given = choice.amounts(worker.reserved, none=False)
        more = self.model.spread(worker.reserved, amounts_in_units(given, worker.reserved))
        known = {name: units + more.get(name, 0) for name, units in worker.reserved.items()}
        reply = self.pair.real(real.grow(given))
        if max(known.values()) >= CLOSED:
            assert isinstance(reply, InvalidAmount)
        else:
            self._extended(reply, real, worker, lambda: self.model.grow_mine(worker, more))

    def _extended(self, reply, real, worker: Worker, expect) -> bool:
        _, model = self.pair.alike(reply, expect)
        if isinstance(model, Refused):
            return False
        view = self.model.view(model.id)
        worker.reserved = view["amounts"]
        agree(fields(real, ("amounts", "expires_at")), {name: view[name] for name in ("amounts", "expires_at")})
        return True

    @rule(place=places, choice=choices)
    def commit_mine(self, place, choice):
        if hold := self._hold(place):
            real, worker = hold
            given = choice.amounts(worker.reserved)
            amounts = amounts_in_units(given, worker.reserved)
            self.pair.alike(self.pair.real(real.commit(given)), lambda: self.model.commit_mine(worker, amounts))

    @rule(place=places)
    def release_mine(self, place):
        if hold := self._hold(place):
            real, worker = hold
            self.pair.alike(self.pair.real(real.release()), lambda: self.model.release_mine(worker))

    @rule(
        number=numbers,
        one=reservations,
        on_error=st.sampled_from(["release", "charge"]),
        fails=st.booleans(),
        settles=st.booleans(),
        data=st.data(),
    )
    def use_a_block(self, number, one, on_error, fails, settles, data):
        """Leave `async with limiter.hold(…)` in each way."""
        number, (amounts, new, ttl, policy) = self._replica(number), one
        call = self._reservation(number, *one)
        used = data.draw(st.lists(mapping_for(list(amounts), zero=True), max_size=2), label="used")
        workers: list[Worker] = []

        async def block(limiter):
            options = {"id": new, "ttl": ttl, "on_expiry": policy, "on_error": on_error, "operation": f"for {new}"}
            async with limiter.hold(amounts, **options) as hold:
                _, model = self.pair.alike(hold, call.expect)
                workers.append(self.model.worker(model, int(ttl * 1000)))
                for given in used:
                    self._accrue(hold, workers[0], given)
                if settles:
                    await self._release_inside(hold, workers[0])
                if fails:
                    raise Left

        reply = self.pair.real(_run_block(block(self.pair.limiters[number])))
        if workers:
            self._compare_end_of_block(reply, workers[0], fails, on_error == "charge")
        else:
            self.pair.alike(reply, call.expect)

    def _compare_end_of_block(self, reply, worker: Worker, fails: bool, keep: bool) -> None:
        try:
            self.model.leave(worker, failed=fails, keep=keep)
            expected = None
        except Refused as refused:  # the error of the block is raised instead
            expected = None if fails else refused.kind
        assert (reply and type(reply).__name__) == expected

    async def _release_inside(self, hold, worker: Worker) -> None:
        try:
            reply = await hold.release()
        except BudgetError as error:
            reply = error
        self.pair.alike(reply, lambda: self.model.release_mine(worker))

    # -- limits, time, reads -------------------------------------------------------------------------------------------

    @rule(number=numbers, name=usual, data=st.data())
    def set_limit(self, number, name, data):
        number = self._replica(number)
        limit = data.draw(usd_limits if BY_NAME[name].unit == "usd" else count_limits, label="limit")
        until = data.draw(st.sampled_from([None, None, "window", 30, 7200, 100_000]), label="until")
        until_ms = until
        if isinstance(until, int):
            until = self.server.frozen_at + timedelta(seconds=until)
            until_ms = int(until.timestamp() * 1000)
        units = None if limit is None else units_of(limit, BY_NAME[name].unit, down=True)
        reply = self.runner.run(self.pair.limiters[number].set_limit(name, limit, until))
        self.model.set_limit(name, units, until_ms)
        agree(fields(reply, STATUS_FIELDS), self.model.status(number, name))

    @rule(number=numbers, name=usual)
    def clear_limit(self, number, name):
        number = self._replica(number)
        reply = self.runner.run(self.pair.limiters[number].clear_limit(name))
        self.model.clear_limit(name)
        agree(fields(reply, STATUS_FIELDS), self.model.status(number, name))

    @rule(seconds=steps_s)
    def wait(self, seconds):
        self.pair.advance(int(seconds * 1000))

    @rule(after=st.booleans())
    def wait_for_the_next_event(self, after):
        """Advance to half a second before or after the next deadline, end of a window or the like."""
        later = [at for at in self.model.instants() if at > self.model.now_ms + 600]
        self.pair.advance(min(later) - self.model.now_ms + (500 if after else -500))

    @precondition(lambda self: len(self.pair.limiters) < 3)
    @rule(limits=configured_limits)
    def start_another_replica(self, limits):
        self.pair.advance(1000)
        self.pair.start_replica(limits)

    @rule(number=numbers, name=usual)
    def read_status(self, number, name):
        self.pair.compare_status(self._replica(number), name)

    @rule(number=numbers, page=st.sampled_from([1, 2, 3, 1000]))
    def read_everything(self, number, page):
        self.pair.compare_everything(self._replica(number), page)
        for known in NEW_IDS:
            self.pair.compare_hold(self._replica(number), known)


PROFILE = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


async def _run_block(block) -> None:
    with contextlib.suppress(Left):
        await block


@pytest.mark.slow
@pytest.mark.timeout(3600)
# A retrying client of redis-py draws its pause from the global generator, perhaps while a strategy draws.
@pytest.mark.filterwarnings("ignore:Do not use the .random. module:hypothesis.errors.HypothesisDeprecationWarning")
def test_random_histories_agree_with_the_reference_model(clocked_server, runner):
    run_state_machine_as_test(lambda: Histories(clocked_server, runner), settings=PROFILE)
