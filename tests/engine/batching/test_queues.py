"""The choice of calls for a batch: no kind of request starves another."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from ktrdr_budget.engine.batching.pending import PendingCall
from ktrdr_budget.engine.batching.queues import Queues
from ktrdr_budget.engine.protocol.codes import CommitMode, ExtendMode
from ktrdr_budget.engine.protocol.operations import (
    Commit,
    CommitAmount,
    Extend,
    ExtendAmount,
    Labels,
    Operation,
    RecordSpend,
    Release,
    Reserve,
)

from ...helpers.windows import make_window

WINDOW = make_window()


def operation(kind: str, windows: int) -> Operation:
    """A commit (D), a record (N), a release (L), a heartbeat (E), growth (G), or a reservation (R)."""
    touched, parts = [WINDOW] * windows, [(WINDOW, 5)] * windows
    match kind:
        case "D":
            return Commit("id", "key", touched, [CommitAmount(CommitMode.EXACT, 1)] * windows)
        case "N":
            return RecordSpend("id", "key", parts)
        case "L":
            return Release("id", "key", touched)
        case "E":
            return Extend("id", "key", touched, [ExtendAmount(accrued=5)] * windows, 1000, ExtendMode.HEARTBEAT)
        case "G":
            return Extend("id", "key", touched, [ExtendAmount(reserved=5)] * windows, 1000, ExtendMode.GROW)
    return Reserve("id", "key", parts, ttl_ms=1000, policy="c", labels=Labels(), now_ms=0)


def call(kind: str, *, windows: int = 1, flow: Any = None) -> PendingCall:
    made = PendingCall(flow or (None for _ in ()), Future(), kind, 0.0, 10.0)
    made.request = operation(kind, windows)
    return made


def queues(**waiting: int) -> Queues:
    made = Queues()
    for kind, count in waiting.items():
        for _ in range(count):
            made.put(call(kind))
    return made


def taken(batch: list[PendingCall]) -> str:
    return "".join(call.operation for call in batch)


def test_a_batch_takes_settlements_first_then_extensions_then_reservations_and_growth():
    assert taken(queues(R=2, E=2, D=2, G=1).take(16, 100)) == "DDEERRG"


@pytest.mark.parametrize(
    ("waiting", "batch"),
    [
        ({"N": 100, "R": 1}, "N" * 15 + "R"),
        ({"N": 100, "R": 100}, "N" * 12 + "R" * 4),
        ({"N": 100, "G": 100}, "N" * 12 + "G" * 4),
        ({"N": 100, "E": 3}, "N" * 13 + "E" * 3),
        ({"N": 100, "E": 3, "R": 100}, "N" * 9 + "E" * 3 + "R" * 4),
        ({"E": 100, "N": 2, "R": 1}, "NN" + "E" * 13 + "R"),
        ({"E": 100, "N": 100, "R": 100}, "N" * 4 + "E" * 8 + "R" * 4),
        ({"E": 100}, "E" * 16),
        ({"R": 100}, "R" * 16),
    ],
)
def test_each_kind_of_call_gets_a_minimum_share_of_a_full_batch(waiting, batch):
    assert taken(queues(**waiting).take(16, 1000)) == batch


def test_each_kind_of_call_gets_a_share_of_each_batch_even_if_calls_touch_many_windows():
    made = Queues()
    for kind in "NER" * 10:
        made.put(call(kind, windows=100))
    for _ in range(3):
        assert set(taken(made.take(100, 400))) == set("NER")


def test_calls_put_back_into_the_queues_are_taken_first_in_their_original_order():
    made = queues(N=1, R=1)
    batch = [call("N"), call("R"), call("N"), call("R")]
    made.put_back(batch)
    again = made.take(16, 100)
    assert [call for call in again if call in batch] == [batch[0], batch[2], batch[1], batch[3]]
    assert taken(again) == "NNNRRR"
    assert again.index(batch[2]) == 1 and again.index(batch[3]) == 4


def test_if_the_caller_of_an_unsent_call_is_cancelled_reserve_and_grow_are_dropped_but_other_calls_are_sent():
    made = Queues()
    kinds = "DNLEGR"
    for kind in kinds:
        cancelled = call(kind)
        cancelled.future.cancel()
        made.put(cancelled)
        sent = call(kind)
        sent.was_resent = True
        sent.future.cancel()
        made.put(sent)
    assert taken(made.take(100, 100)) == "DDNNLLEEGR"
    assert not made
