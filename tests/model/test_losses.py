"""Random histories with data losses: after the repair, holds, sums and replays are as the model predicts.

A loss destroys the data that only the store has: the order of ledger entries and the counts of events. The journals of
the replicas restore the requests, states and costs of holds, and run-time limits.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis.stateful import rule, run_state_machine_as_test

from ktrdr_budget.engine.protocol.hold_record import unword
from ktrdr_budget.engine.replica import journal

from .observed import NOISE_MS, RawStore
from .reference import CLOSED, DAY_MS, HoldModel
from .test_histories import PROFILE, Histories
from .threaded import Threaded


class Losses(Histories):
    """Random histories with data losses."""

    @rule()
    def lose_everything(self):
        settled = [hold for hold in self.model.holds.values() if hold.settled_ms is not None]
        # Ids of older settlements are not replayed: the store may have dropped them.
        oldest_ms = self.model.now_ms - DAY_MS // 2 + 5000
        replayed = all((hold.journalled_ms or hold.settled_ms) > oldest_ms for hold in settled)
        # Replayed subtotals are numbers of Lua.
        exact = all(window.spent < CLOSED for window in self.model.windows.values())
        if not (self.model.grants and replayed and exact):
            return
        for hold in settled:
            hold.journalled_ms = hold.journalled_ms or hold.settled_ms
        self.pair.advance(2 * NOISE_MS)  # reads now are later than all writes
        self._read_all()
        self._drop_settled_holds()
        self.pair.client.flushall()
        repaired_ms = self.model.now_ms
        self._read_all()
        self.pair.advance(4000)  # until the end of the recovery
        self._read_all()
        self._apply_loss_to_model(repaired_ms)

    def _read_all(self) -> None:
        """Read from each replica: it reads the store's clock, notices a loss, repairs it and expires due holds."""
        for limiter in self.pair.limiters:
            self.runner.run(limiter.statuses())

    def _drop_settled_holds(self) -> None:
        """Make each replica drop from its journal the holds that others have settled, as it does at intervals."""
        for limiter in self.pair.limiters:
            check = limiter.engine.dispatcher.repair.check_holds
            if isinstance(limiter, Threaded):
                self.runner.run(asyncio.to_thread(limiter.engine.runner.portal.run, check()))
            else:
                self.runner.run(check())

    def _apply_loss_to_model(self, repaired_ms: int) -> None:
        """Copy into the model the stored figures that a repair cannot restore."""
        store = RawStore(self.pair.client)
        for hold in self.model.holds.values():
            if hold.settled_ms is not None:  # the store keeps its id for another day
                hold.settled_ms = repaired_ms
            if hold.state in ("committed", "released"):
                self._apply_record_to_model(hold, store.holds[hold.id])
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
    def _apply_record_to_model(hold: HoldModel, record: str) -> None:
        """Copy deadline and totals from the replayed record, which may lack an extension by another replica."""
        head, *segments = record.split("|")
        hold.deadline_ms = int(head.split(" ")[2])
        for segment, part in zip(segments, hold.parts.values(), strict=True):
            _, name, base, reserved, accrued, _ = segment.split(",")
            assert name == f"{part.window.budget.name}:{part.window.name}"
            assert int(base or reserved) == part.requested
            part.reserved, part.accrued = int(reserved), int(accrued or 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
# A retrying client of redis-py draws its pause from the global generator, perhaps while a strategy draws.
@pytest.mark.filterwarnings("ignore:Do not use the .random. module:hypothesis.errors.HypothesisDeprecationWarning")
def test_random_histories_with_data_losses_agree_with_the_reference_model(clocked_server, runner, monkeypatch):
    monkeypatch.setattr(journal, "_FRESH_MS", -DAY_MS)  # the clock is frozen, so all holds are of this moment
    run_state_machine_as_test(lambda: Losses(clocked_server, runner), settings=PROFILE)
