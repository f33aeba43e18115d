"""Replies to operations: each line has one meaning."""

from __future__ import annotations

import pytest

from ktrdr_budget.engine.protocol.codes import CommitMode, ExtendMode
from ktrdr_budget.engine.protocol.operations import (
    Commit,
    CommitAmount,
    Extend,
    ExtendAmount,
    Labels,
    RecordSpend,
    Release,
    ReplayLimit,
    ReplayTotal,
    Reserve,
    Restore,
    Retire,
    SettleOnBehalf,
)
from ktrdr_budget.engine.protocol.replies import (
    Conflict,
    Denied,
    Extended,
    Granted,
    MissingWindow,
    NotFast,
    OtherDefinition,
    OtherWindows,
    Outgrown,
    Recovering,
    Replayed,
    Restored,
    Retired,
    Settled,
    StaleWindow,
    TooManyBudgetsReply,
    TooManyHoldsReply,
    UnexpectedReply,
    UnknownHoldReply,
    UnknownLimit,
    Unreadable,
    WindowFull,
)

from ...helpers.windows import make_window

AGENT = make_window()
RECORD = f"o c 9 8 0 - - - -|u,{AGENT.name},,5,,"
RESERVE = Reserve("a", "key", [(AGENT, 5)], ttl_ms=1000, policy="c", labels=Labels(), now_ms=0)
COMMIT = Commit("a", "key", [AGENT], [CommitAmount(CommitMode.EXACT, 7)])
RELEASE = Release("a", "key", [AGENT])
SPEND = RecordSpend("a", "key", [(AGENT, 7)])
EXTEND = Extend("a", "key", [AGENT], [ExtendAmount(5)], 1000, ExtendMode.HEARTBEAT)
RESTORE = Restore("a", "key", [AGENT], RECORD)


@pytest.mark.parametrize(
    ("op", "line", "reply"),
    [
        (RESERVE, "g", Granted()),
        (RESERVE, f"p {RECORD}", Replayed(RECORD)),
        (COMMIT, "k - 7", Settled((7,))),
        (COMMIT, "k ol 7", Settled((7,), overrun=True, late=True)),
        (COMMIT, "p - 7 0123456789ab", Settled((7,), replayed=True, replica="0123456789ab")),
        (COMMIT, "p - 7 -", Settled((7,), replayed=True)),
        (RELEASE, "k l 0", Settled((0,), late=True)),
        (
            SPEND,
            "p - 7 0123456789ab agent:2026-11-30~k3f9a1",
            Settled((7,), True, replica="0123456789ab", windows=(("agent", "2026-11-30~k3f9a1"),)),
        ),
        (EXTEND, f"e {RECORD}", Extended(RECORD)),
        (EXTEND, f"a {RECORD}", Outgrown(RECORD)),
        (Retire("a", "key", [AGENT]), "x", Retired()),
        (RESTORE, "g", Restored(True)),
        (RESTORE, "p", Restored(False)),
        (RESTORE, "k - 7", Settled((7,))),
        (SettleOnBehalf("you", RESTORE), "a", Restored(False)),
        (SettleOnBehalf("you", SPEND), "k - 7", Settled((7,))),
        (ReplayTotal("key", AGENT, 9), "k - 2", Settled((2,))),
        (ReplayLimit("key", "agent", None, 0, 1, "usd,day,UTC,spend"), "g", Restored(True)),
        (ReplayLimit("key", "agent", None, 0, 1, "usd,day,UTC,spend"), "p", Restored(False)),
    ],
)
def test_each_operation_parses_each_of_its_replies(op, line, reply):
    assert op.parse(line) == reply


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("d agent:w 10 1 2 3 4 5", Denied("agent:w", 10, 1, 2, 3, 4, 5)),
        ("d agent:w - 1 2 3 4 5 6", Denied("agent:w", None, 1, 2, 3, 4, 5, 6)),
        (f"c {RECORD}", Conflict(RECORD)),
        ("u", UnknownHoldReply()),
        (f"v {RECORD}", OtherWindows(RECORD)),
        ("w", StaleWindow()),
        ("t agent:w", MissingWindow("agent:w")),
        ("m agent usd,day,UTC,spend", OtherDefinition("agent", "usd,day,UTC,spend")),
        ("l 1764000000000", Recovering(1_764_000_000_000)),
        ("h 20 1764000000000", TooManyHoldsReply(20, 1_764_000_000_000)),
        ("b user/1:2026-11-30~k3f9a1", TooManyBudgetsReply("user/1")),
        ("q user/1:2026-11-30~k3f9a1", UnknownLimit("user/1")),
        ("f agent:w", WindowFull("agent:w")),
        ("y WRONGTYPE …", Unreadable("WRONGTYPE …")),
        ("s", NotFast()),
        ("!", UnexpectedReply("!")),
    ],
)
def test_the_line_of_a_refusal_is_parsed_to_the_same_reply_for_every_operation(line, reply):
    for op in (RESERVE, COMMIT, RELEASE, SPEND, EXTEND, RESTORE):
        assert op.parse(line) == reply


def test_the_requested_amounts_are_settled_if_the_reply_to_a_fast_commit_is_only_a_letter():
    commit = Commit("a", "key", [AGENT], [CommitAmount(CommitMode.EXACT, 7)])
    commit.enable_fast_path("0123456789ab", RESERVE.granted(8, 9), [(AGENT, 5)])
    assert commit.parse("k") == Settled((7,), overrun=True)
    assert commit.parse("k - 7") == Settled((7,))
