"""A batch has operations, each of their windows once, and the state of the replica; it gets one reply."""

from __future__ import annotations

import pytest

from ktrdr_budget.engine.protocol.batch import BatchHead, EncodedBatch, Header, Settings, encode_batch, parse_batch
from ktrdr_budget.engine.protocol.codes import CommitMode
from ktrdr_budget.engine.protocol.operations import Commit, CommitAmount, Labels, Operation, Reserve
from ktrdr_budget.engine.protocol.replies import Granted, Settled, StaleWindow
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.periods import window_named

from ...helpers.windows import DAY, KEYS, make_window

AGENT, TEAM, JOBS = make_window("agent"), make_window("team"), make_window("jobs", "s")
SETTINGS = Settings(id_memory_ms=11, retention_ms=22, ledger_entries_max=33, budgets_max=44, holds_max=55)


def header(epoch: str | None = "e1", started_us: int | None = 7) -> Header:
    return Header("r1", epoch, 3, started_us=started_us, age_us=9, proposed_epoch="e2", settings=SETTINGS)


def reserve(hold_id: str, *windows: Window) -> Reserve:
    terms = {"ttl_ms": 1000, "policy": "c", "labels": Labels(), "now_ms": 0}
    return Reserve(hold_id, KEYS.hold(hold_id), [(window, 5) for window in windows], **terms)


def commit(hold_id: str, *windows: Window) -> Commit:
    amounts = [CommitAmount(CommitMode.EXACT, 7)] * len(windows)
    return Commit(hold_id, KEYS.hold(hold_id), windows, amounts)


def granted(hold_id: str, *windows: Window) -> Reserve:
    """A reservation in windows that have a grant."""
    reserve("before", *windows).granted(8, 9)
    return reserve(hold_id, *windows)


def committed(hold_id: str, *windows: Window) -> Commit:
    """A commit in its fast form."""
    op = commit(hold_id, *windows)
    op.enable_fast_path("r1", reserve(hold_id, *windows).granted(8, 9), [(window, 5) for window in windows])
    return op


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_batch_describes_each_window_once_and_operations_name_windows_by_number():
    ops = [commit("a", AGENT), commit("b", TEAM, AGENT), commit("c", TEAM)]
    _, keys, args = encode_batch(KEYS, header(), ops)
    assert args[-3:] == ["D a 1:x7", "D b 2:x7 1:x7", "D c 2:x7"]
    assert args[6:-3] == [*AGENT.words, *TEAM.words]
    assert args[4] == "2", "windows"
    assert keys[7:] == [
        *(AGENT.key, AGENT.ledger_key, TEAM.key, TEAM.ledger_key),
        *(KEYS.hold("a"), KEYS.hold("b"), KEYS.hold("c")),
    ]
    assert keys[:7] == [*KEYS.of_writes]


def test_a_batch_begins_with_the_state_and_the_settings_of_the_sending_replica():
    args = encode_batch(KEYS, header(), []).args
    assert args == ["r1", "e1", "3", "7", "0", "e2 11 22 000000000033 000000000044 000000000055"]


def test_a_replica_sends_its_age_instead_of_its_start_time_before_the_first_reply_of_the_store():
    assert encode_batch(KEYS, header(epoch=None, started_us=None), []).args[:4] == ["r1", "-", "3", "-9"]


@pytest.mark.parametrize(
    ("ops", "script"),
    [
        ([reserve("a", AGENT), reserve("b", AGENT)], "reserve"),
        ([commit("a", AGENT)], "settle"),
        ([commit("a", AGENT), reserve("b", AGENT)], "write"),
    ],
)
def test_a_batch_uses_the_smallest_script_that_executes_all_its_operations(ops, script):
    assert encode_batch(KEYS, header(), ops).script == script
    assert encode_batch(KEYS, header(), ops, repairs=True).script == "repair"


# -- the fast path -----------------------------------------------------------------------------------------------------


def encode_fast(*ops: Operation, **state: str | None) -> EncodedBatch:
    return encode_batch(KEYS, header(**state), ops, use_fast_path=True)


def test_a_batch_takes_the_fast_path_if_use_fast_path_is_set_and_every_operation_supports_it():
    fast = [granted("a", make_window()), committed("b", AGENT)]
    assert encode_fast(*fast).script == "fast_path"
    assert encode_batch(KEYS, header(), fast).script == "write"
    assert encode_fast(*fast, commit("c", AGENT)).script == "write"


def test_a_fast_batch_marks_the_windows_of_its_reservations():
    agent, team = make_window("agent"), make_window("team")
    _, keys, args = encode_fast(committed("a", team), granted("b", agent), committed("c", agent))
    count, *marks = args[8:11]
    assert (count, marks) == ("2", ["-", "!"])
    assert keys[:4] == [*KEYS.of_writes[:4]]
    assert keys[4:8] == [team.key, team.ledger_key, agent.key, agent.ledger_key]


def test_a_fast_batch_is_valid_while_the_windows_of_all_its_reservations_are_current():
    hour = window_named("hour", "UTC", "2026-11-30T07Z")
    now = Window(KEYS, "calls", hour, "n")
    bounds = [f"{hour.start_ms:013d}000", f"{hour.end_ms:013d}000"]
    assert encode_fast(granted("a", make_window()), granted("b", now, make_window("jobs", "s"))).args[4:6] == bounds
    endless = ["0" * 16, "9999999999999000"]
    assert encode_fast(granted("a", make_window("jobs", "s"))).args[4:6] == endless
    assert encode_fast(committed("a", AGENT)).args[4:6] == endless, "the window of a commit may have ended"
    assert DAY.start_ms < hour.start_ms < hour.end_ms < DAY.end_ms


def test_a_fast_batch_writes_the_start_time_of_its_replica_with_a_fixed_number_of_digits():
    assert encode_fast(committed("a", AGENT)).args[:4] == ["r:r1", "e1", "3", "0000000000000007 r1"]
    assert encode_fast(committed("a", AGENT), epoch=None).args[1] == "-"


# -- replies -----------------------------------------------------------------------------------------------------------


def test_the_reply_to_a_batch_has_one_line_for_each_operation_in_the_same_order():
    ops = [commit("a", AGENT), reserve("b", TEAM), reserve("c", TEAM)]
    for reply in ("8000 - 4 -\nk - 7\ng\nw", b"8000 - 4 -\nk - 7\ng\nw"):
        head, replies = parse_batch(reply, ops)
        assert head == BatchHead(8000, False, 4, None, ())
        assert replies == [Settled((7,)), Granted(), StaleWindow()]


def test_the_head_of_a_reply_has_a_new_epoch_and_the_ids_of_due_holds():
    head, _ = parse_batch("8000 - 4 e2 op_1 op_2", [])
    assert head == BatchHead(8000, False, 4, "e2", ("op_1", "op_2"))


def test_a_reply_after_a_data_loss_has_no_line_for_any_operation():
    assert parse_batch("8000 L 1 e2", [commit("a", AGENT)]) == (BatchHead(8000, True, 1, "e2", ()), [])


@pytest.mark.parametrize("reply", ["8000 - 4 -", "8000 - 4 -\nk - 7\nk - 7"])
def test_a_reply_with_too_few_or_too_many_lines_is_an_error(reply):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        parse_batch(reply, [commit("a", AGENT)])
