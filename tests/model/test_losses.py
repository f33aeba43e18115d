"""Random histories in which the store is emptied: after the repair holds, sums and replays are as the model predicts.

A loss takes what only the store has: the course of a ledger, and how often something was counted. What holds were asked
for, what they are and what they cost comes back from the replicas' journals, and so do limits of run time.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import assume
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from ktrdr_budget.engine.protocol.hold_record import unword
from ktrdr_budget.engine.replica import journal as memory

from .observed import NOISE_MS, RawStore
from .reference import CLOSED, DAY_MS, HoldModel
from .test_histories import PROFILE, Histories


class Losses(Histories):
    """The same histories, with losses."""

    @precondition(lambda self: self.model.grants)
    @rule()
    def lose_everything(self):
        for hold in self.model.holds.values():
            if hold.settled_ms is not None:
                # Ids of older settlements are not replayed: the store could have forgotten them.
                hold.journalled_ms = hold.journalled_ms or hold.settled_ms
                assume(self.model.now_ms - hold.journalled_ms < DAY_MS // 2 - 5000)
        # The totals of a replica are told as numbers of Lua.
        assume(all(window.spent < CLOSED for window in self.model.windows.values()))
        self.pair.advance(2 * NOISE_MS)  # so that what is read now is later than what was written
        self._read_all()
        self._look_for_settled()
        self.pair.client.flushall()
        repaired_ms = self.model.now_ms
        self._read_all()
        self.pair.advance(4000)  # until the store admits again
        self._read_all()
        self._learn_what_is_lost(repaired_ms)

    def _read_all(self) -> None:
        """Each replica learns the time, notices a loss and repairs it; what is due is retired."""
        for limiter in self.pair.limiters:
            self.runner.run(limiter.statuses())

    def _look_for_settled(self) -> None:
        """As each replica does all the time: it forgets holds that others have settled."""
        for limiter in self.pair.limiters:
            recovery = limiter.engine.dispatcher.repair

            async def look(recovery=recovery) -> None:
                recovery.engine.state.journal._looked = 0
                await recovery._look_for_settled()

            inner = getattr(limiter, "_inner", None)
            if inner is None:
                self.runner.run(look())
            else:
                self.runner.run(asyncio.to_thread(inner._portal.run, look()))

    def _learn_what_is_lost(self, repaired_ms: int) -> None:
        store = RawStore(self.pair.client)
        for hold in self.model.holds.values():
            if hold.settled_ms is not None:  # its id is remembered for a day again
                hold.settled_ms = repaired_ms
            if hold.state in ("committed", "released"):
                self._learn_what_was_seen(hold, store.holds[hold.id])
            if hold.state == "recorded":
                hold.created_ms = hold.deadline_ms = repaired_ms
        started = [limiter.replica_id for limiter in self.pair.limiters]
        for (name, window_name), window in self.model.windows.items():
            stored = store.windows.get(f"{name}:{window_name}", {})
            window.events, window.overruns = int(stored.get("events", 0)), int(stored.get("overruns", 0))
            window.ledger = [
                (entry.kind, entry.hold_id.strip("-"), entry.units, unword(entry.operation))
                for entry in store.ledgers.get(f"{name}:{window_name}", [])
            ]
            window.asserted_by, window.asserted = -1, None
            if "asserted" in stored:
                window.asserted_by = started.index(stored["asserted"].split(" ")[1])
                window.asserted = None if stored["limit"] == "-" else int(stored["limit"])

    @staticmethod
    def _learn_what_was_seen(hold: HoldModel, record: str) -> None:
        """Who settled a hold may not have seen yet that another replica had prolonged it, or let it grow."""
        head, *segments = record.split("|")
        hold.deadline_ms = int(head.split(" ")[2])
        for segment, part in zip(segments, hold.parts.values(), strict=True):
            _, name, base, reserved, accrued, _ = segment.split(",")
            assert name == f"{part.window.budget.name}:{part.window.name}"
            assert int(base or reserved) == part.asked
            part.reserved, part.accrued = int(reserved), int(accrued or 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
# A client of redis-py that retries draws its pause from the global generator, perhaps while a strategy draws.
@pytest.mark.filterwarnings("ignore:Do not use the .random. module:hypothesis.errors.HypothesisDeprecationWarning")
def test_random_histories_with_losses_go_as_the_model_says(clocked_server, runner, monkeypatch):
    monkeypatch.setattr(memory, "_FRESH_MS", -DAY_MS)  # the clock stands still: all that happens is of this moment
    run_state_machine_as_test(lambda: Losses(clocked_server, runner), settings=PROFILE)
