"""The scripts of `lua/` on a real server: each reply, exact figures, and no undeclared key."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import redis

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.engine.protocol import scripts
from ktrdr_budget.engine.protocol.batch import BatchHead, encode_batch, parse_batch
from ktrdr_budget.engine.protocol.codes import CommitMode
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.engine.protocol.operations import (
    Commit,
    CommitAmount,
    Labels,
    Numbers,
    Operation,
    Reserve,
    Restore,
)
from ktrdr_budget.engine.protocol.window import BatchWindows, Window
from ktrdr_budget.engine.replica.state import ReplicaState

from ...helpers.keyspace import Entry, dump, immortal_keys, ledger_entries
from ...helpers.waiting import wait_until

LUA = Path(__file__).parents[3] / "lua"
DAY_MS = 86_400_000
TIMES = "c 9999999999999 1764000000000000 0"
"""Fields of a record: policy, deadline, time of the grant, time of the last growth."""
BUDGETS = [
    Budget("agent", "5.00"),
    Budget("cycles", 10, unit="cycles"),
    Budget("jobs", 2, kind="slots"),
    Budget("all", None, period="ever"),
]


class Raw(Operation):
    """An operation given as its text on the wire; its reply is the unparsed line."""

    def __init__(
        self,
        hold_id: str,
        key: str,
        windows: Sequence[Window],
        render: Callable[[Numbers], str],
        render_fast: Callable[[Numbers], str] | None = None,
    ) -> None:
        super().__init__(hold_id, key, windows)
        self.letter = render(BatchWindows())[0]
        self.asks_for_money = self.letter == "R"
        self.render = render
        self.fast = render_fast

    def render_fast(self, numbers: Numbers) -> str:
        return (self.fast or self.render)(numbers)

    def parse(self, line: str) -> str:
        return line


class Wire:
    """Sends requests to the write scripts in the form that their headers describe."""

    def __init__(self, client: redis.Redis, budgets: list[Budget] = BUDGETS, **settings: int) -> None:
        self.client = client
        self.session = ReplicaState("t", budgets, **settings)
        self.session.set_clock(self.now_us(), 0)
        self.keys: list[str] = []
        self.head: BatchHead | None = None

    def op(self, head: str, **parts: str) -> Raw:
        letter, *words = head.split(" ")
        if letter == "S":
            inner = self.op(" ".join(words[1:]), **parts)
            return Raw(inner.hold_id, inner.key, inner.windows, lambda numbers: f"S {words[0]} {inner.render(numbers)}")
        hold_id = words.pop(0)
        key = self.session.keys.hold(hold_id)
        tails = [(self.session.current_window(name), tail) for name, tail in parts.items()]
        windows = [window for window, _ in tails]
        if letter == "K":  # head: that of the record; tail: base, reserved, accrued, charged
            segments = [f"|{window.flag},{window.name},{tail}" for window, tail in tails]
            record = " ".join(words) + "".join(segments)
            return Raw(hold_id, key, windows, Restore(hold_id, key, windows, record).render)
        if letter == "R":
            wanted = [(window, int(tail[1:])) for window, tail in tails]
            ttl_ms, policy, *texts = words
            labels = Labels(*("" if word == "-" else word for word in texts))
            op = Reserve(hold_id, key, wanted, int(ttl_ms), policy, labels, self.session.now_ms())
            return Raw(hold_id, key, windows, lambda numbers: op.render(numbers).replace("%21", "!"))
        return Raw(
            hold_id, key, windows, lambda numbers: head + "".join(numbers[window] + tail for window, tail in tails)
        )

    def commit(self, hold_id: str, *, counted: dict[str, int], **spent: int) -> Raw:
        """A commit that may take the fast path."""
        windows = [self.session.current_window(name) for name in spent]
        key = self.session.keys.hold(hold_id)
        amounts = [CommitAmount(CommitMode.EXACT, units) for units in spent.values()]
        made = Commit(hold_id, key, windows, amounts)
        reserved = [(window, counted[window.budget]) for window in windows]
        made.enable_fast_path(self.session.replica_id, self.record(hold_id), reserved)
        return Raw(hold_id, key, windows, made.render, made.render_fast)

    def send(self, *ops: Raw, fast: bool = False) -> list[str]:
        header = self.session.header
        for op in ops:
            op.uses_fast_path = op.letter == "R" or op.fast is not None
        name, self.keys, args = encode_batch(self.session.keys, header, ops, use_fast_path=fast)
        assert (name == scripts.FAST_PATH) == fast
        reply = self.client.eval(scripts.script(name).source, len(self.keys), *self.keys, *args)
        self.head, lines = parse_batch(reply, ops)
        self.session.absorb(self.head, header)
        return lines

    def request(self, head: str, **parts: str) -> str:
        [line] = self.send(self.op(head, **parts))
        return line

    def reserve(self, hold_id: str, ttl_ms: int = 60_000, policy: str = "c", **amounts: int) -> str:
        return self.request(f"R {hold_id} {ttl_ms} {policy} - - -", **{name: f":{n}" for name, n in amounts.items()})

    def record(self, hold_id: str) -> str | None:
        return self.client.get(self.session.keys.hold(hold_id))

    def sums(self, budget: str) -> dict[str, int]:
        stored = self.client.hgetall(self.session.current_window(budget).key)
        return {name: int(stored.get(name, 0)) for name in ("spent", "held", "unconfirmed", "events", "overruns")}

    def ledger(self, budget: str) -> list[int]:
        return [entry.units for entry in self.entries(budget)]

    def entries(self, budget: str) -> list[Entry]:
        return ledger_entries(self.client, self.session.current_window(budget).ledger_key)

    def now_us(self) -> int:
        seconds, microseconds = self.client.time()
        return seconds * 1_000_000 + microseconds

    def wait_due(self, hold_id: str) -> None:
        deadline_ms = int(self.record(hold_id).split(" ")[2])
        wait_until(lambda: self.now_us() >= deadline_ms * 1000)

    def yesterday(self) -> Wire:
        """Another replica, whose clock is a day late until the first reply of the store."""
        other = Wire(self.client)
        other.session.set_clock(self.now_us() - DAY_MS * 1000, 0)
        return other


@pytest.fixture
def wire(client: redis.Redis) -> Wire:
    return Wire(client)


# -- the files ---------------------------------------------------------------------------------------------------------


def test_every_lua_file_in_the_package_is_part_of_a_script():
    shipped = {path.stem for path in LUA.glob("*.lua")}
    everything = "".join(scripts.script(name).source for name in scripts.PARTS)
    included = set(
        re.findall(r"^ *-- include: (\w+)\.lua$", "".join(map(Path.read_text, LUA.glob("*.lua"))), re.MULTILINE)
    )
    assert shipped == included.union(*scripts.PARTS.values())
    for path in LUA.glob("*.lua"):
        assert scripts.read_part(path.stem) in everything
        assert re.match(rf"-- {path.name}( \(part\))?: ", path.read_text(encoding="utf-8")), (
            "a header says what it does"
        )


def test_no_lua_file_formats_amounts_with_tostring():
    """`tostring` and `..` format a double of 15 digits as 1.23e+14."""
    for path in LUA.glob("*.lua"):
        code = "\n".join(line.split("--")[0] for line in path.read_text(encoding="utf-8").splitlines())
        assert "tostring(" not in code, path.name


# -- replies -----------------------------------------------------------------------------------------------------------


def test_the_reply_to_a_reservation_is_a_grant_a_replay_a_conflict_or_a_denial(wire):
    assert wire.reserve("op_1", agent=150, cycles=1) == "g"
    record = wire.record("op_1")
    assert record.startswith("o c ") and record.endswith(
        f"|u,agent:{day(wire)},,150,,|n,cycles:{day(wire, 'cycles')},,1,,"
    )
    assert wire.reserve("op_1", agent=150, cycles=1) == f"p {record}"
    assert wire.reserve("op_1", cycles=1, agent=150) == f"p {record}", "the order of budgets does not matter"
    for other in ({"agent": 151, "cycles": 1}, {"agent": 150}, {"agent": 150, "cycles": 1, "jobs": 1}):
        assert wire.reserve("op_1", **other) == f"c {record}"
    assert wire.reserve("op_1", policy="r", agent=150, cycles=1) == f"c {record}"
    limit = 5 * 10**9
    first_deadline = record.split(" ")[2]
    assert wire.reserve("op_2", agent=limit) == f"d agent:{day(wire)} {limit} 0 150 0 {limit} {first_deadline}"
    assert wire.record("op_2") is None
    assert wire.sums("agent")["held"] == 150


@pytest.mark.parametrize(("granted", "repeated"), [("alice!", "alice!"), ("-!", "bob!")])
def test_equal_digests_of_two_reservations_make_a_replay_and_different_digests_a_conflict(wire, granted, repeated):
    def request(owner: str, policy: str = "c", **amounts: int) -> str:
        return wire.request(f"R op_1 60000 {policy} {owner} - -", **{name: f":{n}" for name, n in amounts.items()})

    assert request(f"{granted}one.0123-1", agent=150) == "g"
    record = wire.record("op_1")
    assert request(f"{repeated}one.0123-2", agent=151, cycles=1) == f"p {record}", "budgets were redefined meanwhile"
    assert request(f"{repeated}two.0123-3", agent=150) == f"c {record}"
    assert request("-", agent=150) == f"p {record}", "a request without a digest is compared by its amounts"
    assert request("-", agent=151) == f"c {record}"
    assert request("-", policy="a", agent=150) == f"c {record}"


def test_a_reservation_is_compared_by_its_amounts_if_only_the_request_has_a_digest(wire):
    wire.reserve("op_1", agent=150)
    assert wire.request("R op_1 60000 c -!one.0123-2 a.call -", agent=":150") == f"p {wire.record('op_1')}"
    assert wire.request("R op_1 60000 c -!one.0123-2 a.call -", agent=":151") == f"c {wire.record('op_1')}"


def test_equal_digests_of_two_records_of_spend_make_a_replay_and_different_digests_a_conflict(wire):
    assert wire.request("N op_1 0 -!one. - - -", agent=":20", cycles=":1") == "k - 20,1"
    record = wire.record("op_1")
    replay = f"p - 20,1 {wire.session.replica_id} agent:{day(wire)},cycles:{day(wire, 'cycles')}"
    assert wire.request("N op_1 0 -!one. - - -", all=":5") == replay, "budgets were redefined meanwhile"
    assert wire.request("N op_1 0 -!two. - - -", agent=":20", cycles=":1") == f"c {record}"
    assert wire.request("N op_1 0 - - - -", cycles=":1", agent=":20") == replay
    assert wire.request("N op_1 0 - - - -", agent=":21", cycles=":1") == f"c {record}"


def test_each_ledger_entry_of_a_hold_has_the_fields_of_its_scope_without_the_units(wire):
    scope = "team=quant,user=alice"
    for hold_id in ("op_1", "op_2", "op_3"):
        assert wire.request(f"R {hold_id} 1000 c - - - {scope};usd", agent=":150") == "g"
    assert wire.send(wire.commit("op_1", counted={"agent": 150}, agent=70), fast=True) == ["k"]
    assert wire.request("E op_2 60000 0", agent=":0:0").startswith("e ")
    assert wire.request("D op_2", agent=":x80") == "k - 80"
    wire.wait_due("op_3")
    assert wire.request("E op_3 1000 0", agent=":0:0").startswith("e "), "it expires, and is opened again"
    wire.wait_due("op_3")
    assert wire.request("L op_3 1", agent=":x0") == "k l 0"
    assert wire.request("D op_3", agent=":x60") == "k l 60"
    assert wire.request(f"N op_4 0 - - - {scope}", agent=":5") == "k - 5"
    assert wire.request(f"K op_5 c {TIMES} - - - {scope};usd", agent=",150,,90") == "k - 90"
    assert wire.request(f"S you N op_6 1 - - - {scope};usd", agent=":4") == "k - 4"
    kinds = ["commit", "commit", "expiry", "revival", "expiry", "release", "correction", "record", "commit", "record"]
    assert [(entry.kind, entry.scope) for entry in wire.entries("agent")] == [(kind, scope) for kind in kinds]
    for hold_id in ("op_1", "op_2", "op_3", "op_5", "op_6"):
        assert f" {scope};usd|" in wire.record(hold_id)


def test_a_ledger_entry_of_a_hold_in_a_scope_without_fields_has_no_scope(wire):
    for hold_id in ("op_1", "op_2"):
        assert wire.request(f"R {hold_id} 60000 c - - - ;usd", agent=":150") == "g"
    assert wire.send(wire.commit("op_1", counted={"agent": 150}, agent=70), fast=True) == ["k"]
    assert wire.request("D op_2", agent=":x80") == "k - 80"
    assert [entry.scope for entry in wire.entries("agent")] == ["-", "-"]


def day(wire: Wire, budget: str = "agent") -> str:
    return wire.session.current_window(budget).stored


def test_a_reservation_with_a_past_window_or_a_different_definition_is_refused(client, wire):
    assert wire.yesterday().reserve("op_1", agent=150) == "w"
    assert dump(client) == {}
    assert wire.reserve("op_1", agent=150) == "g"
    other = Wire(client, [Budget("agent", "5.00", timezone="Etc/UTC")])
    assert other.reserve("op_2", agent=150) == "m agent usd,day,UTC,spend"
    assert other.request("N op_2 0 - research - -", agent=":20") == "m agent usd,day,UTC,spend"
    assert other.reserve("op_1", agent=150).startswith("p "), "a replay comes before all checks"
    assert other.request("N op_2 1 - research - -", agent=":20") == "k - 20", "spend is a fact, in a window of its own"
    assert (wire.sums("agent")["spent"], other.sums("agent")["spent"]) == (0, 20)


def test_a_commit_settles_its_hold_once_and_a_different_settlement_is_a_conflict(wire):
    wire.reserve("op_1", agent=150, cycles=2, jobs=1)
    parts = {"agent": ":x70", "cycles": ":r2", "jobs": ":x1"}
    assert wire.request("D op_1", **parts) == "k - 70,2,0"
    assert wire.request("D op_1", **parts) == f"p - 70,2,0 {wire.session.replica_id}"
    assert Wire(wire.client).request("D op_1", **parts) == f"p - 70,2,0 {wire.session.replica_id}"
    assert wire.request("D op_1", **{**parts, "agent": ":x71"}) == f"c {wire.record('op_1')}"
    assert wire.request("L op_1 0", **parts) == f"c {wire.record('op_1')}"
    assert wire.request("D unknown", agent=":x1") == "u"
    assert (wire.sums("agent"), wire.ledger("agent")) == (figures(spent=70, events=1), [70])
    assert wire.sums("cycles") == figures(spent=2, events=1)
    assert wire.sums("jobs") == figures(), "slots are never spent"


def figures(**given: int) -> dict[str, int]:
    return {name: given.get(name, 0) for name in ("spent", "held", "unconfirmed", "events", "overruns")}


def test_the_reply_to_a_commit_has_flags_for_an_overrun_and_for_a_late_commit(wire):
    wire.reserve("op_1", agent=150)
    assert wire.request("D op_1", agent=":x151") == "k o 151"
    wire.reserve("op_2", ttl_ms=1000, agent=150)
    wire.wait_due("op_2")
    assert wire.request("D op_2", agent=":x151") == "k ol 151"
    assert wire.ledger("agent") == [151, 150, 1], "the charge at its deadline, and its correction"
    assert wire.sums("agent") == figures(spent=302, events=4 - 1, overruns=2)


def test_the_mode_of_a_commit_selects_the_given_or_the_reserved_or_the_accrued_amount(wire):
    for hold_id, mode, expected in (
        ("op_1", "x70", 70),
        ("op_2", "r150", 150),
        ("op_3", "a0", 80),
        ("op_4", "a90", 90),
    ):
        wire.reserve(hold_id, agent=150)
        assert wire.request(f"E {hold_id} 60000 0", agent=":80:0").startswith("e o ")
        assert wire.request(f"D {hold_id}", agent=f":{mode}") == f"k - {expected}"


def test_a_hold_is_released_once_and_a_commit_can_correct_only_a_release_by_an_operator(wire):
    wire.reserve("op_1", agent=150)
    assert wire.request("L op_1 0", agent=":x0") == "k - 0"
    assert wire.request("L op_1 0", agent=":x0") == "p - 0"
    assert wire.request("D op_1", agent=":x70") == f"c {wire.record('op_1')}"
    assert wire.request("L unknown 0") == "u"
    wire.reserve("op_2", agent=150)
    assert wire.request("L op_2 1", agent=":x0") == "k - 0"
    assert wire.record("op_2").startswith("z ")
    assert wire.request("L op_2 1", agent=":x0") == "p - 0"
    assert wire.request("D op_2", agent=":x70") == "k l 70", "a late commit of the worker counts, once"
    assert wire.sums("agent") == figures(spent=70, events=1)


def test_the_reply_is_the_record_of_the_hold_if_an_operation_omits_a_window_of_the_hold(wire):
    wire.reserve("op_1", agent=150, cycles=1)
    for head in ("D op_1", "L op_1 0", "E op_1 60000 0", "X op_1"):
        assert wire.request(head, agent=":x70" if head[0] != "E" else ":0:0") == f"v {wire.record('op_1')}"


def test_spend_is_recorded_once_for_each_id_and_only_late_spend_is_accepted_in_an_ended_window(client, wire):
    assert wire.request("N op_1 0 - research - -", agent=":20", cycles=":1") == "k - 20,1"
    words = f"p - 20,1 {wire.session.replica_id} agent:{day(wire)},cycles:{day(wire, 'cycles')}"
    assert wire.request("N op_1 0 - research - -", agent=":20", cycles=":1") == words
    assert Wire(client).request("N op_1 0 - research - -", cycles=":1", agent=":20") == words
    assert wire.request("N op_1 0 - research - -", agent=":21", cycles=":1") == f"c {wire.record('op_1')}"
    assert wire.reserve("op_1", agent=20, cycles=1) == f"c {wire.record('op_1')}"
    assert wire.yesterday().request("N op_2 0 - - - -", agent=":20") == "w"
    late = wire.yesterday()
    ended = late.session.current_window("agent")
    assert late.request("N op_2 1 - - - -", agent=":20") == "k - 20"
    assert client.hget(ended.key, "spent") == "20"
    berlin = Wire(client, [Budget("agent", "5.00", timezone="Etc/UTC")])
    assert berlin.request("N op_3 0 - - - -", agent=":20") == "m agent usd,day,UTC,spend"
    assert wire.sums("agent") == figures(spent=20, events=1)
    assert immortal_keys(client) == []


def test_a_repeated_reservation_or_commit_is_a_replay_after_a_lost_commit_is_restored(client, wire):
    head = f"K op_1 c {TIMES} me research t1 -"
    parts = {"agent": "150,200,,70", "cycles": ",1,,2", "jobs": ",1,,0"}
    assert wire.request(head, **parts) == "k o 70,2,0"
    assert wire.request(head, **parts) == f"p - 70,2,0 {wire.session.replica_id}"
    assert wire.request(head, **(parts | {"agent": "150,200,,71"})) == f"c {wire.record('op_1')}"
    assert wire.request(f"K op_1 o {TIMES} me research t1 -", **parts) == "p", "a settlement wins"
    assert wire.request(f"K op_1 r {TIMES} me research t1 -", **parts) == f"c {wire.record('op_1')}"
    assert wire.reserve("op_1", agent=150, cycles=1, jobs=1) == f"p {wire.record('op_1')}"
    assert wire.reserve("op_1", policy="a", agent=150, cycles=1, jobs=1) == f"c {wire.record('op_1')}"
    assert wire.sums("agent") == figures(spent=70, events=1)
    assert wire.sums("cycles") == figures(spent=2, events=1, overruns=1)
    assert not immortal_keys(client)


@pytest.mark.parametrize("known", ["unknown", "open", "expired"])
@pytest.mark.parametrize("state", "rz")
def test_a_repeated_reservation_or_release_is_a_replay_after_a_lost_release_is_restored(client, wire, state, known):
    if known != "unknown":
        wire.reserve("op_1", ttl_ms=60_000 if known == "open" else 1, agent=150)
    if known == "expired":
        wait_until(lambda: wire.request("X op_1", agent="") == "x" and wire.record("op_1")[0] == "x")
    head = f"K op_1 {state} {TIMES} - - - -"
    assert wire.request(head, agent=",150,,") == f"k {'l' if known == 'expired' else '-'} 0"
    assert wire.request(head, agent=",150,,").startswith("p")
    assert wire.reserve("op_1", agent=150) == f"p {wire.record('op_1')}"
    assert {name: wire.sums("agent")[name] for name in ("spent", "held", "unconfirmed")} == {
        "spent": 0, "held": 0, "unconfirmed": 0,
    }  # fmt: skip
    lives_ms = client.pttl(wire.session.keys.hold("op_1"))
    assert (lives_ms <= DAY_MS) is (state == "r"), "an operator's release can be corrected as long as the window lives"
    if state == "z":
        assert wire.request("D op_1", agent=":x70") == "k l 70"
    else:
        assert wire.request("D op_1", agent=":x70") == f"c {wire.record('op_1')}"


def test_restoring_a_hold_is_a_conflict_if_the_store_has_the_hold_with_other_contents(wire):
    wire.reserve("op_1", agent=150)
    before = wire.record("op_1")
    assert wire.request(f"K op_1 c {TIMES} - - - -", cycles=",1,,1") == f"c {before}"
    assert wire.request(f"K op_1 c {TIMES} - - - -", agent=",150,,70", cycles=",1,,1") == f"c {before}"
    assert wire.request("N op_2 0 - - - -", agent=":5") == "k - 5"
    assert wire.request(f"K op_2 c {TIMES} - - - -", agent=",5,,5") == f"c {wire.record('op_2')}"


# -- a window whose key is missing -------------------------------------------------------------------------------------

TOUCHING = {
    "R new 60000 c - - -": ":150",
    "D op_1": ":x70",
    "M op_1 model trace": ":x70",
    "L op_1 0": ":x0",
    "L op_z 0": ":x0",
    "E op_1 60000 0": ":30:200",
    "X op_x": "",
    "N new 0 - - - -": ":20",
    f"K new c {TIMES} - - - -": ",20,,20",
    f"K new r {TIMES} - - - -": ",20,,",
    f"K new z {TIMES} - - - -": ",20,,",
    f"K new o {TIMES} - - - -": ",20,,",
    f"K op_1 o {TIMES} - - - -": "150,200,,",
    f"K op_1 c {TIMES} - - - -": ",150,,70",
    f"K op_x c {TIMES} - - - -": ",150,,70",
    f"K op_1 r {TIMES} - - - -": ",150,,",
    "T -": ":20",
    f"S replica K op_1 c {TIMES} - - - -": ",150,,70",
    f"S replica K new c {TIMES} - - - -": ",20,,20",
}


@pytest.fixture
def begun(client, wire) -> Wire:
    """Holds in the windows of the budgets agent and cycles; the window of agent has lost its key."""
    wire.reserve("op_1", agent=150)
    wire.reserve("op_z", agent=150)
    wire.request("L op_z 1", agent=":x0")
    wire.reserve("op_x", ttl_ms=1000, agent=150)
    wire.reserve("op_2", cycles=1)
    wire.reserve("op_both", cycles=1, agent=150)
    wire.wait_due("op_x")
    client.delete(wire.session.current_window("agent").key)
    return wire


def stored(wire: Wire) -> dict[str, object]:
    """The contents of all keys except the keys that every batch may write."""
    everything = dump(wire.client)
    for key in (wire.session.keys.meta, wire.session.keys.replicas):
        del everything[key]
    return everything


@pytest.mark.parametrize("head", TOUCHING)
def test_no_operation_writes_into_a_window_whose_key_is_missing(begun, head):
    before, missing = stored(begun), f"t agent:{day(begun)}"
    assert begun.request(head, agent=TOUCHING[head]) == missing
    assert begun.send(begun.op(head, agent=TOUCHING[head]), begun.op("L unknown 0", cycles=":x0")) == [missing, "u"]
    assert stored(begun) == before


def test_the_fast_path_writes_nothing_if_the_key_of_a_window_is_missing(begun):
    before = stored(begun)
    commits = [
        begun.commit("op_1", counted={"agent": 150}, agent=70),
        begun.commit("op_2", counted={"cycles": 1}, cycles=1),
    ]
    assert begun.send(*commits, fast=True) == ["s", "s"]
    assert stored(begun) == before


def test_operations_on_existing_windows_succeed_even_if_another_window_of_the_batch_is_missing(begun):
    missing = f"t agent:{day(begun)}"
    commit, lacking = begun.op("D op_2", cycles=":x1"), begun.op("D op_both", cycles=":x1", agent=":x70")
    assert begun.send(begun.op("D op_1", agent=":x70"), lacking, commit) == [missing, missing, "k - 1"]
    assert begun.sums("cycles") == figures(spent=1, held=1, events=1)
    reserve = begun.op("R op_3 60000 c - - -", cycles=":1")
    assert begun.send(begun.op("D op_both", cycles=":x1", agent=":x70"), reserve) == [missing, "g"]
    assert begun.sums("cycles") == figures(spent=1, held=2, events=1)
    assert begun.record("op_both").startswith("o ")


def test_requests_for_a_settled_hold_are_replays_even_if_its_window_is_missing(client, wire):
    wire.reserve("op_1", agent=150)
    wire.request("D op_1", agent=":x70")
    client.delete(wire.session.current_window("agent").key)
    assert wire.request("D op_1", agent=":x70").startswith("p - 70 ")
    assert wire.reserve("op_1", agent=150).startswith("p c ")


def test_a_commit_by_the_fast_path_is_recorded_with_the_id_of_its_replica(wire):
    wire.reserve("op_1", agent=150)
    assert wire.send(wire.commit("op_1", counted={"agent": 150}, agent=70), fast=True) == ["k"]
    assert Wire(wire.client).request("D op_1", agent=":x70") == f"p - 70 {wire.session.replica_id}"


# -- a window that counts almost 2^62 units ----------------------------------------------------------------------------

MORE = 10**9
ADDING_MORE = {
    "D op_1": f":x{150 + MORE}",
    "M op_1 model trace": f":x{150 + MORE}",
    "E op_1 60000 0": f":{150 + MORE}:150",
    "N new 0 - - - -": f":{MORE}",
    "N new 1 - - - -": f":{MORE}",
    f"K new o {TIMES} - - - -": f",{MORE},,",
    f"K new x {TIMES} - - - -": f",{MORE},,{MORE}",
    f"K new c {TIMES} - - - -": f",{MORE},,{MORE}",
    f"K op_1 o {TIMES} - - - -": f"150,{150 + MORE},,",
    f"K op_1 c {TIMES} - - - -": f",150,,{150 + MORE}",
    "T -": f":{MORE}",
    "S you N new 1 - - - -": f":{MORE}",
    f"S you K op_1 c {TIMES} - - - -": f",150,,{150 + MORE}",
}
"""Operations that add ``MORE`` units to the units that the window counts."""


@pytest.mark.parametrize("head", ADDING_MORE)
def test_an_operation_is_refused_if_its_window_would_count_2_to_the_62_units(client, wire, head):
    wire.reserve("op_1", agent=150)
    key = wire.session.current_window("agent").key
    client.hset(key, mapping={"spent": 2**62 - MORE // 2, f"r:{wire.session.replica_id}": 0})
    before = stored(wire)
    assert wire.request(head, agent=ADDING_MORE[head]) == f"f agent:{day(wire)}"
    assert stored(wire) == before
    client.hset(key, "spent", 2**62 - MORE * 2)
    assert wire.request(head, agent=ADDING_MORE[head])[0] in "kge", "a window may count fewer"


# -- replays after a loss ----------------------------------------------------------------------------------------------


def test_each_batch_of_replays_prolongs_the_recovery(client, wire):
    for op in (wire.op(f"S you K op_1 c {TIMES} - - - -", agent=",20,,20"), wire.op("T -", agent=":20")):
        client.hset(wire.session.keys.meta, "recovering_until", 1)
        wire.send(op)
        assert int(client.hget(wire.session.keys.meta, "recovering_until")) >= wire.head.now_us // 1000 + 1000


def test_a_settlement_replayed_by_replica_1_on_behalf_of_replica_2_counts_in_the_subtotal_of_replica_2(client, wire):
    key = wire.session.current_window("agent").key
    maker = Wire(client)
    maker.record("unknown")
    me, you = wire.session.replica_id, maker.session.replica_id
    wire.reserve("op_1", agent=150)
    assert wire.request(f"S {you} K op_1 c {TIMES} - - - -", agent=",150,,70") == "k - 70"
    assert wire.request(f"S {you} K lost c {TIMES} - - - -", agent=",5,,5") == "k - 5"
    assert wire.request(f"S {you} N spent 1 - - - -", agent=":3") == "k - 3"
    assert wire.request(f"S {you} N spent 1 - - - -", agent=":3").startswith(f"p - 3 {you} ")
    assert (client.hget(key, f"r:{you}"), client.hget(key, f"r:{me}")) == ("78", "0")
    assert wire.sums("agent") == figures(spent=78, events=3)
    assert maker.request("T -", agent=":100") == "k - 22"
    assert wire.request(f"S {you} K other c {TIMES} - - - -", agent=",5,,5") == "a", (
        "the replayed subtotal of that replica includes it"
    )
    assert wire.sums("agent") == figures(spent=100, events=4)
    client.hset(wire.session.keys.meta, "epoch", "4.another")  # another loss; that replica has not replayed
    wire.session.renew()
    assert wire.request(f"S {you} K other c {TIMES} - - - -", agent=",5,,5") == "k - 5"


def test_an_extension_prolongs_or_enlarges_an_open_hold_but_no_settled_or_unknown_hold(wire):
    assert wire.request("E unknown 60000 0", agent=":0:0") == "u"
    wire.reserve("op_1", agent=150)
    before = wire.record("op_1").split(" ")
    assert wire.request("E op_1 90000 0", agent=":30:0") == f"e {wire.record('op_1')}"
    after = wire.record("op_1").split(" ")
    assert int(after[2]) > int(before[2]) and after[-1].endswith(",150,30,")
    kept = after[2]
    assert wire.request("E op_1 90000 1", agent=":10:250") == f"e {wire.record('op_1')}"
    assert wire.record("op_1").split(" ")[2] == kept, "growth keeps the deadline"
    assert wire.record("op_1").endswith(f"|u,agent:{day(wire)},150,250,30,"), "the largest total wins"
    assert wire.sums("agent")["held"] == 250
    limit = 5 * 10**9
    denied = wire.request("E op_1 90000 1", agent=f":0:{limit + 1}")
    assert denied.startswith(f"d agent:{day(wire)} {limit} 0 250 0 {limit + 1 - 250} ")
    assert wire.reserve("op_1", agent=150).startswith("p "), "a retry of the reservation has the first amount"
    wire.request("D op_1", agent=":x70")
    assert wire.request("E op_1 90000 0", agent=":0:0") == f"c {wire.record('op_1')}"


def test_an_expired_hold_is_charged_once_by_its_expiry_policy_and_returns_its_slots(wire):
    for hold_id, policy, slots in (("op_c", "c", {"jobs": 1}), ("op_a", "a", {"jobs": 1}), ("op_r", "r", {})):
        assert wire.reserve(hold_id, 1000, policy, agent=150, **slots) == "g"
        used = {"agent": ":30:0", **dict.fromkeys(slots, ":0:0")}
        assert wire.request(f"E {hold_id} 1000 0", **used).startswith("e o ")
    assert wire.request("X op_c", agent="", jobs="") == "x"
    assert wire.record("op_c").startswith("o "), "not due yet"
    wire.wait_due("op_r")
    for hold_id in ("op_c", "op_a"):
        assert wire.request(f"X {hold_id}", agent="", jobs="") == "x"
    assert wire.request("X op_r", agent="") == "x"
    assert wire.sums("agent") == figures(unconfirmed=180, events=2)
    assert wire.sums("jobs") == figures(), "expiry returns the slot, whatever the policy"
    assert wire.request("X op_c", agent="", jobs="") == "x"
    assert wire.sums("agent")["unconfirmed"] == 180, "once"
    assert wire.request("X unknown") == "x"


def test_extending_an_expired_hold_needs_room_only_for_the_money_returned_at_its_expiry(wire):
    wire.reserve("op_1", 1000, "a", agent=150)
    wire.request("E op_1 1000 0", agent=":30:0")
    wire.wait_due("op_1")
    wire.request("X op_1", agent="")
    assert wire.sums("agent") == figures(unconfirmed=30, events=1)
    wire.request("N other 0 - - - -", agent=f":{5 * 10**9 - 100}")
    assert wire.request("E op_1 60000 0", agent=":30:0").startswith("d agent:")
    assert wire.request("E op_1 60000 0", agent=":150:0").startswith("e o "), "reported spend is a fact"
    assert wire.sums("agent") == figures(spent=5 * 10**9 - 100, held=150, events=2)
    assert sum(wire.ledger("agent")) == 5 * 10**9 - 100


def test_a_duplicate_request_within_one_batch_is_a_replay(wire):
    first, again, other = (wire.op("R op_1 60000 c - - -", agent=f":{n}") for n in (150, 150, 151))
    lines = wire.send(first, again, other, wire.op("D op_1", agent=":x70"), wire.op("E op_1 60000 0", agent=":0:0"))
    assert [line[0] for line in lines] == ["g", "p", "c", "k", "c"]
    assert wire.sums("agent") == figures(spent=70, events=1)
    assert wire.client.zcard(wire.session.keys.due) == 0


def test_the_head_of_a_reply_has_the_time_and_the_epoch_and_due_holds_and_the_number_of_writes(client, wire):
    wire.reserve("op_1", 1000, agent=150)
    head = wire.head
    assert (head.acknowledged, head.data_loss, head.due) == (1, False, ())
    assert head.epoch is not None and head.epoch.startswith("4.")
    assert abs(head.now_us - client.time()[0] * 1_000_000) < 2_000_000
    wire.reserve("op_2", agent=6 * 10**9)
    assert (wire.head.acknowledged, wire.head.epoch) == (1, None), "a denial is no write; the epoch is known"
    wire.wait_due("op_1")
    wire.reserve("op_3", agent=6 * 10**9)
    assert wire.head.due == ("op_1",)


def test_the_store_grants_nothing_from_the_report_of_a_data_loss_to_the_end_of_the_recovery(client, wire):
    wire.reserve("op_1", agent=150)
    client.flushall()
    again = wire.op("R op_2 60000 c - - -", agent=":150")
    assert wire.send(again, wire.op("N op_3 0 - - - -", agent=":10")) == []
    assert (wire.head.data_loss, wire.head.acknowledged) == (True, 0)
    assert list(client.scan_iter()) == ["ktrdr:{t}:meta"]
    [refused] = wire.send(again)
    assert not wire.head.data_loss
    word, until_ms = refused.split(" ")
    assert word == "l"
    assert 0 < int(until_ms) - wire.now_us() // 1000 <= 3000
    assert wire.request("N op_3 0 - - - -", agent=":10") == "k - 10", "facts need no admission"
    assert wire.request("N op_4 0 - - - -", agent=":0") == "k - 0"
    assert wire.reserve("op_4", agent=150).startswith("c "), "a replay or a conflict comes first"
    wait_until(lambda: wire.now_us() // 1000 >= int(until_ms))
    assert wire.send(again) == ["g"]


def test_replaying_a_subtotal_raises_the_stored_subtotal_to_the_replayed_value(client, wire):
    wire.request("N op_1 0 - - - -", agent=":10")
    assert wire.request("T -", agent=":10") == "k - 0"
    assert wire.request("T -", agent=":25") == "k - 15"
    assert wire.request("T -", agent=":25") == "k - 0"
    assert (wire.sums("agent"), wire.ledger("agent")) == (figures(spent=25, events=2), [10, 15])
    other = Wire(client)
    assert other.request("T -", agent=":5") == "k - 5", "each replica has its own"
    assert wire.sums("agent")["spent"] == 30
    assert wire.send(wire.op("N op_2 1 - - - -", agent=":5"), wire.op("T -", agent=":40")) == ["k - 5", "k - 10"]


def test_an_open_hold_is_restored_once_and_can_then_be_committed(client, wire):
    deadline_ms = wire.now_us() // 1000 + 60_000
    head = f"K op_1 o c {deadline_ms} {wire.now_us()} 0 me research - -"
    parts = {"agent": ",150,200,", "jobs": ",1,,"}
    assert wire.request(head, **parts) == "g"
    assert wire.record("op_1").startswith(f"o c {deadline_ms} ")
    assert (wire.sums("agent")["held"], wire.sums("jobs")["held"]) == (200, 1)
    assert wire.request(head, **parts) == "p"
    assert not immortal_keys(client)
    assert wire.request("D op_1", agent=":x70", jobs=":x0") == "k - 70,0"
    assert wire.request(head, **parts) == "p", "a settlement wins"
    assert (wire.sums("agent"), wire.sums("jobs")) == (figures(spent=70, events=1), figures())


def test_restoring_an_open_hold_that_still_exists_can_only_raise_its_totals(wire):
    wire.reserve("op_1", agent=150, jobs=1)
    deadline_ms = wire.now_us() // 1000 + 120_000
    head = f"K op_1 o c {deadline_ms} {wire.now_us()} 0 - - - -"
    assert wire.request(head, agent=",100,,", jobs=",1,,") == "g", "prolonged"
    assert wire.request(head, agent="150,200,,", jobs=",1,,") == "g"
    assert wire.request(head, agent="150,200,250,", jobs=",1,,") == "g"
    assert wire.request(head, agent="150,180,240,", jobs=",1,,") == "p"
    assert (wire.sums("agent")["held"], wire.sums("jobs")["held"]) == (250, 1)
    assert ",150,200,250," in wire.record("op_1")
    assert wire.request("D op_1", agent=":x70", jobs=":x0") == "k - 70,0"
    assert wire.sums("agent") == figures(spent=70, events=1)


def test_a_hold_restored_after_its_deadline_is_charged_as_unconfirmed(wire):
    deadline_ms = wire.now_us() // 1000 - 1
    assert wire.request(f"K open o c {deadline_ms} {wire.now_us()} 0 - - - -", agent=",150,,") == "g"
    assert wire.sums("agent") == figures(held=150)
    assert wire.request("X open", agent="") == "x"
    head = f"K expired x a {deadline_ms} {wire.now_us()} 0 - - - -"
    assert wire.request(head, agent=",150,70,70", jobs=",1,,") == "g"
    assert wire.sums("agent") == figures(unconfirmed=220, events=2)
    assert wire.request("D expired", agent=":x80", jobs=":x0") == "k l 80,0"
    assert wire.sums("agent") == figures(unconfirmed=150, spent=80, events=3)


@pytest.mark.parametrize("schema", ["1", "2", "30"])
def test_a_script_refuses_a_store_with_an_older_or_newer_schema(client, wire, schema):
    """For example, the ledgers of an older schema have another type."""
    client.hset("ktrdr:{t}:meta", "epoch", schema + ".0123456789abcdef")
    with pytest.raises(redis.ResponseError, match="KTRDRSCHEMA"):
        wire.reserve("op_1", agent=150)
    keys = [wire.session.keys.meta, wire.session.keys.limits, wire.session.keys.due]
    with pytest.raises(redis.ResponseError, match="KTRDRSCHEMA"):
        client.eval(scripts.script("status").source, 3, *keys, "replica")
    assert list(client.scan_iter()) == ["ktrdr:{t}:meta"]


# -- the limit in force ------------------------------------------------------------------------------------------------


def with_limit(client: redis.Redis, limit: str, started_us: int, replica: str = "") -> Wire:
    """A replica that started at this time of the store's clock."""
    made = Wire(client, [Budget("agent", limit)])
    made.session.renew()
    made.session.replica_id = replica or made.session.replica_id
    made.session.set_clock(started_us, 0)
    return made


def limit_in_force(wire: Wire) -> str | None:
    return wire.client.hget(wire.session.current_window("agent").key, "limit")


@pytest.mark.parametrize("first", [0, 1])
def test_the_limit_of_the_replica_with_the_larger_id_applies_if_two_replicas_started_together(client, wire, first):
    started = wire.now_us()
    replicas = [
        with_limit(client, "2.00", started, "00000000000a"),
        with_limit(client, "3.00", started, "00000000000b"),
    ]
    for number in (first, 1 - first, first):
        replicas[number].reserve(f"op_{number}", agent=1)
    assert limit_in_force(wire) == str(3 * 10**9)


def test_the_store_uses_the_current_time_if_a_replica_sends_a_start_time_in_the_future(client, wire):
    ahead = with_limit(client, "2.00", wire.now_us() + 7_200_000_000)
    ahead.reserve("op_1", agent=1)
    earlier = with_limit(client, "1.00", wire.now_us() - 3_600_000_000)
    earlier.reserve("op_2", agent=1)
    assert limit_in_force(wire) == str(2 * 10**9)
    later = with_limit(client, "3.00", wire.now_us())
    later.reserve("op_3", agent=1)
    ahead.reserve("op_4", agent=1)  # with the start that the store has assigned to it
    assert limit_in_force(wire) == str(3 * 10**9)


def test_a_new_replica_can_still_replace_the_limit_after_the_clock_of_the_store_was_set_back(client, wire):
    wire.reserve("op_1", agent=1)
    key = wire.session.current_window("agent").key
    client.hset(key, mapping={"limit": 7, "asserted": f"{wire.now_us() + 7_200_000_000} ffffffffffff"})
    with_limit(client, "3.00", wire.now_us()).reserve("op_2", agent=1)
    assert limit_in_force(wire) == str(3 * 10**9)


def test_the_store_and_the_replica_compute_the_same_start_time_if_the_replica_sends_its_age(client, wire):
    before_us = wire.now_us()
    unsynced = Wire(client)
    unsynced.session.renew()
    sent = unsynced.session.header
    assert (sent.started_us, 0 <= sent.age_us < 10_000_000) == (None, True)
    unsynced.reserve("op_1", agent=1)
    started_us, replica = client.hget(wire.session.current_window("agent").key, "asserted").split(" ")
    assert before_us - 1_000_000 < int(started_us) <= unsynced.head.now_us
    assert (int(started_us), replica) == unsynced.session.claim, "the store and the replica have the same claim"


# -- the fast path -----------------------------------------------------------------------------------------------------


@pytest.fixture
def usual(wire: Wire) -> Wire:
    """A store on which the fast path applies: each budget has its window with this replica's limit."""
    wire.reserve("first", agent=1, cycles=1, jobs=1, all=1)
    return wire


def test_the_fast_path_and_the_full_script_write_the_same_records_and_sums(client, usual):
    amounts, spent = {"agent": 150, "cycles": 2, "jobs": 1}, {"agent": 151, "cycles": 1, "jobs": 0}
    parts = {name: f":{units}" for name, units in amounts.items()}
    records, sums, expiries = {}, {}, {}
    for fast in (False, True):
        hold_id = f"op_{fast}"
        before = {name: usual.sums(name) for name in amounts}
        assert usual.send(usual.op(f"R {hold_id} 60000 a me research t1", **parts), fast=fast) == ["g"]
        assert client.zscore("ktrdr:{t}:due", hold_id) == int(usual.record(hold_id).split(" ")[2])
        granted, expires_ms = usual.record(hold_id), client.pexpiretime(usual.session.keys.hold(hold_id))
        commit = usual.commit(hold_id, counted=amounts, **spent)
        [line] = usual.send(commit, fast=fast)
        assert line == ("k" if fast else "k o 151,1,0")
        assert client.zscore("ktrdr:{t}:due", hold_id) is None
        assert 0 < client.pttl(usual.session.keys.hold(hold_id)) <= DAY_MS
        times = granted.split(" ")[2:4]
        records[fast] = [text.replace(times[0], "").replace(times[1], "") for text in (granted, usual.record(hold_id))]
        expiries[fast] = expires_ms
        after = {name: usual.sums(name) for name in amounts}
        sums[fast] = {name: {key: after[name][key] - before[name][key] for key in before[name]} for name in before}
    assert records[True] == records[False]
    assert 0 <= expiries[True] - expiries[False] < 60_000, "of windows without end: long after now"
    assert sums[True] == sums[False]
    assert usual.ledger("agent") == [151, 151]
    labels = [" ".join(entry[2:]) for entry in usual.entries("agent")]
    assert labels == ["commit op_False research t1 -", "commit op_True research t1 -"]
    assert immortal_keys(client) == []


def test_the_fast_path_admits_the_operations_of_a_batch_in_order_up_to_the_exact_limit(usual):
    limit = 5 * 10**9
    lines = usual.send(*(usual.op(f"R op_{n} 60000 c - - -", agent=f":{limit // 4}") for n in range(4)), fast=True)
    assert lines == ["g", "g", "g", "s"], "one unit is held"
    commit = usual.commit("op_0", counted={"agent": limit // 4}, agent=limit // 4 - 7)
    surplus = usual.op("R op_4 60000 c - - -", agent=f":{limit // 4 + 7}")
    again = usual.op("R op_5 60000 c - - -", agent=f":{limit // 4 + 5}")
    assert usual.send(commit, surplus, again, usual.op("R op_6 60000 c - - -", agent=":1"), fast=True) == [*"ksgg"]
    assert usual.sums("agent") == figures(spent=limit // 4 - 7, held=limit * 3 // 4 + 7, events=1)
    assert usual.head.acknowledged == usual.session.acknowledged == 3


def test_the_sums_of_a_batch_stay_exact_if_the_fast_path_declines_a_very_large_reservation(client):
    wire = Wire(client, [Budget("agent", None, unit="tokens"), Budget("few", 1, unit="tokens")])
    wire.reserve("first", agent=1, few=1)
    most = 2**53 - 2
    refused = wire.op("R op_1 60000 c - - -", agent=f":{most}", few=":1")
    lines = wire.send(wire.op("R op_0 60000 c - - -", agent=":2"), refused, fast=True)
    assert lines == ["g", "s"]
    assert wire.sums("agent")["held"] == 3


def test_nothing_in_the_store_changes_if_the_fast_path_declines_an_unusual_request(client, usual):
    usual.reserve("op_1", agent=150)
    stale = usual.commit("op_1", counted={"agent": 150}, agent=70)
    usual.request("E op_1 60000 0", agent=":30:0")
    usual.reserve("op_2", 1000, agent=150)
    due = usual.commit("op_2", counted={"agent": 150}, agent=70)
    usual.wait_due("op_2")
    lost = usual.commit("op_1", counted={"agent": 150}, agent=70)
    lost.id, lost.key = "unknown", usual.session.keys.hold("unknown")
    before = dump(client)
    taken = usual.op("R op_1 60000 c - - -", agent=":150")
    mixed = usual.op("R op_3 60000 c - - -", agent=":1", cycles=":11")
    assert usual.send(stale, due, lost, taken, mixed, fast=True) == ["s"] * 5
    yesterday = usual.yesterday()
    yesterday.session.absorb(usual.head, yesterday.session.header)
    yesterday.session.set_clock(usual.now_us() - DAY_MS * 1000, 0)
    newer = Wire(client, [Budget("agent", "7.00")])
    newer.session.set_clock(usual.now_us(), 0)
    other = Wire(client, [Budget("agent", "5.00", timezone="Etc/UTC")])
    for replica in (yesterday, newer, other):
        assert replica.send(replica.op("R op_4 60000 c - - -", agent=":1"), fast=True) == ["s"]
    assert dump(client) == before


def test_the_fast_path_declines_a_commit_if_the_window_counts_almost_2_to_the_62_units(client, usual):
    """The full script then refuses the commit; the fast path does not check the sum after each commit."""
    usual.reserve("op_1", agent=150)
    commit = usual.commit("op_1", counted={"agent": 150}, agent=200)
    client.hset(usual.session.current_window("agent").key, "spent", 2**62 - 160)
    before = dump(client)
    assert usual.send(commit, fast=True) == ["s"]
    assert usual.request("D op_1", agent=":x200") == f"f agent:{day(usual)}"
    assert dump(client) == before


@pytest.mark.parametrize("change", ["epoch", "acknowledged", "repair", "window"])
def test_the_fast_path_declines_a_reservation_after_a_data_loss_or_during_the_recovery(client, usual, change):
    meta, keys = "ktrdr:{t}:meta", usual.session.keys
    usual.reserve("op_1", agent=150)
    commit = usual.commit("op_1", counted={"agent": 150}, agent=70)
    match change:
        case "epoch":
            client.hset(meta, "epoch", "4.0123456789abcdef0123456789abcdef")
        case "acknowledged":
            client.hset(meta, f"r:{usual.session.replica_id}", 0)
        case "repair":
            client.hset(meta, "recovering_until", usual.now_us() // 1000 + 60_000)
        case "window":
            client.delete(usual.session.current_window("agent").key)
    before = dump(client)
    assert usual.send(usual.op("R op_2 60000 c - - -", agent=":150"), fast=True) == ["s"]
    assert dump(client) == before
    expected = "k" if change == "repair" else "s"
    assert usual.send(commit, fast=True) == [expected], "facts need no admission"
    assert keys.meta == meta


def test_the_fast_path_applies_limits_set_at_run_time(client, usual):
    until_ms = usual.now_us() // 1000 + 60_000
    client.hset("ktrdr:{t}:meta", "limits", "1")
    for changed, line in ((f"{10**10} 0", "g"), ("100 0", "s"), (f"- {until_ms}", "g"), ("100 1", "s")):
        client.hset("ktrdr:{t}:limits", "agent", changed)
        hold_id = f"op_{changed.replace(' ', '_')}"
        assert usual.send(usual.op(f"R {hold_id} 60000 c - - -", agent=f":{6 * 10**9}"), fast=True) == [line], changed
        if line == "g":
            usual.request(f"L {hold_id} 0", agent=":x0")


@pytest.mark.parametrize("max_holds", [2, 40_000])
def test_the_fast_path_counts_holds_if_max_holds_is_small_and_otherwise_reads_a_flag_in_the_store(client, max_holds):
    wire = Wire(client, max_holds=max_holds)
    wire.reserve("op_1", agent=1)
    filler = {f"filler_{number}": 9_999_999_999_999 for number in range(max_holds - 1)}
    client.zadd("ktrdr:{t}:due", filler)
    reserve = lambda hold_id: wire.send(wire.op(f"R {hold_id} 60000 c - - -", agent=":1"), fast=True)  # noqa: E731
    assert reserve("op_2") == (["s"] if max_holds == 2 else ["g"])
    if max_holds == 2:
        return
    second = client.time()[0]
    wait_until(lambda: client.time()[0] > second)
    wire.request("X op_1", agent="")  # the full script counts them once a second
    assert reserve("op_3") == ["g"], "a denial does not update the flag"
    wait_until(lambda: client.time()[0] > second + 1)
    wire.request("N op_4 0 - - - -", agent=":1")
    assert client.hget("ktrdr:{t}:meta", "many_holds") == "1"
    assert reserve("op_5") == ["s"]
    client.zrem("ktrdr:{t}:due", *filler)
    second = client.time()[0]
    wait_until(lambda: client.time()[0] > second)
    wire.request("N op_6 0 - - - -", agent=":1")
    assert client.hget("ktrdr:{t}:meta", "many_holds") is None
    assert reserve("op_7") == ["g"]


# -- figures and expiry ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [123_456_789_012_345, 999_999_999_999_999, 9_007_199_254_740_991, 10**15])
def test_amounts_of_15_and_16_digits_stay_exact(client, units):
    wire = Wire(client, [Budget("all", None, unit="tokens", period="ever")])
    assert wire.reserve("op_1", all=units) == "g"
    assert wire.record("op_1").endswith(f",{units},,")
    assert wire.sums("all")["held"] == units
    assert wire.request("E op_1 60000 0", all=f":{units - 1}:0").startswith("e ")
    assert f",{units},{units - 1}," in wire.record("op_1")
    assert wire.request("D op_1", all=":a0") == f"k - {units - 1}"
    assert wire.sums("all") == figures(spent=units - 1, events=1)
    assert wire.ledger("all") == [units - 1]


def test_windows_and_ledgers_expire_one_day_plus_the_retention_after_the_end_of_the_window(client):
    wire = Wire(client, retention_days=3)
    wire.reserve("op_1", agent=150)
    wire.request("D op_1", agent=":x70")
    window = wire.session.current_window("agent")
    expected = window.span.end_ms + 4 * DAY_MS
    assert [client.pexpiretime(key) for key in (window.key, window.ledger_key)] == [expected] * 2


def test_the_id_of_a_settled_hold_expires_after_id_memory_ms_unlike_in_upstash(client):
    """Upstash's script compared a number with a string, so it never set the expiry."""
    wire = Wire(client, id_memory_ms=40)
    for hold_id, settle in (("op_1", "D op_1"), ("op_2", "L op_2 0")):
        wire.reserve(hold_id, agent=150)
        assert client.pttl(f"ktrdr:{{t}}:h:{hold_id}") > DAY_MS, "an open hold lives as long as its windows"
        assert wire.request(settle, agent=":x70").startswith("k ")
    wire.request("N op_3 0 - - - -", agent=":20")
    wait_until(lambda: not list(client.scan_iter("*:h:*")))
    assert wire.sums("agent") == figures(spent=90, events=2)


@pytest.mark.parametrize("fast", [False, True])
def test_the_ledger_of_a_window_without_end_stays_bounded_and_adds_up_to_the_spend(client, fast):
    wire = Wire(client, ledger_entries_max=500)
    wire.reserve("first", all=1)
    for first in range(0, 3000, 100):
        ids = [f"op_{n}" for n in range(first, first + 100)]
        if fast:
            wire.send(*(wire.op(f"R {hold_id} 60000 c - - -", all=":5000") for hold_id in ids), fast=True)
            commits = [wire.commit(hold_id, counted={"all": 5000}, all=int(hold_id[3:])) for hold_id in ids]
            wire.send(*commits, fast=True)
        else:
            wire.send(*(wire.op(f"N {hold_id} 0 - - - -", all=f":{hold_id[3:]}") for hold_id in ids))
    assert sum(wire.ledger("all")) == wire.sums("all")["spent"] == sum(range(3000))
    first, *others = wire.entries("all")
    assert len(others) < 500 and "carried" not in {entry.kind for entry in others}
    assert (first.kind, int(first.hold_id) + len(others)) == ("carried", 3000), "number of trimmed entries"


def test_the_summary_of_trimmed_ledger_entries_is_exact_above_2_to_the_53_units(client):
    """Lua's sums of 2^53 and more are not exact, so HINCRBY adds them up."""
    wire, huge = Wire(client, ledger_entries_max=100), 2**53 - 3
    for first in range(0, 400, 100):
        wire.send(*(wire.op(f"N op_{n} 0 - - - -", all=f":{huge}") for n in range(first, first + 100)))
    for first in range(1000, 2100, 100):
        wire.send(*(wire.op(f"N op_{n} 0 - - - -", all=":1") for n in range(first, first + 100)))
    assert sum(wire.ledger("all")) == 400 * huge + 1100
    assert client.hget(wire.session.current_window("all").key, "spent") == str(400 * huge + 1100)
    assert [entry.kind for entry in wire.entries("all")].count("carried") == 1
    assert client.hexists(wire.session.current_window("all").key, "carried") == 0


def test_replicas_that_sent_no_request_for_days_are_removed_from_the_store(client, wire):
    now_s = client.time()[0]
    for number in range(20):
        age_s = 200_000 if number % 2 else 1000
        client.hset("ktrdr:{t}:meta", f"r:old{number}", 7)
        client.zadd("ktrdr:{t}:replicas", {f"old{number}": now_s - age_s})
    wire.reserve("op_1", agent=150)
    assert client.zcard("ktrdr:{t}:replicas") == 21, "few replicas are kept: the store's clock may have jumped"
    recent = {f"recent{number}": now_s for number in range(2048)}
    client.zadd("ktrdr:{t}:replicas", recent)
    wait_until(lambda: client.time()[0] > now_s + 1)
    wire.reserve("op_2", agent=150)
    client.zrem("ktrdr:{t}:replicas", *recent)
    known = {f"old{number}" for number in range(0, 20, 2)} | {wire.session.replica_id}
    assert set(client.hgetall("ktrdr:{t}:meta")) == {"epoch", *(f"r:{replica}" for replica in known)}
    assert set(client.zrange("ktrdr:{t}:replicas", 0, -1)) == known


# -- declared keys -----------------------------------------------------------------------------------------------------


@pytest.fixture
def strict(client: redis.Redis) -> Callable[[Wire], None]:
    """Restrict the user of a wire to the keys that its last request declared."""

    def restrict(wire: Wire) -> None:
        kwargs = {"enabled": True, "nopass": True, "categories": ["+@all"], "reset": True}
        client.acl_setuser("strict", keys=list(wire.keys), **kwargs)
        wire.client.execute_command("AUTH", "strict", "any")

    return restrict


def test_the_server_refuses_a_script_that_touches_an_undeclared_key(server, client, strict):
    with server.client() as other:
        wire = Wire(other)
        wire.keys = ["a"]
        strict(wire)
        other.eval("return redis.call('SET', KEYS[1], 1)", 1, "a")
        with pytest.raises(redis.RedisError):
            other.eval("return redis.call('SET', 'b', 1)", 1, "a")
    client.acl_deluser("strict")


def test_every_operation_touches_only_declared_keys_unlike_in_runcycles(server, client, strict):
    """Scripts that use undeclared keys fail on a cluster, or fail open."""
    setup, settle = Wire(client, ledger_entries_max=1), {"agent": ":x70", "cycles": ":x1"}
    for number in range(12):
        setup.reserve(f"op_{number}", 1000 if number < 6 else 60_000, agent=150, cycles=1)
    setup.wait_due("op_0")
    client.hset("ktrdr:{t}:limits", "agent", "6000000000 0")
    client.hset("ktrdr:{t}:meta", "limits", "1")
    calls = [
        ("R new 60000 c - - -", {"agent": ":150", "cycles": ":1"}),
        ("R op_6 60000 c - - -", {"agent": ":150", "cycles": ":1"}),
        ("R denied 60000 c - - -", {"agent": ":7000000000"}),
        ("D op_7", settle),
        ("D op_1", settle),
        ("L op_8 0", settle),
        ("L op_2 1", settle),
        ("E op_9 60000 0", {"agent": ":30:200", "cycles": ":0:0"}),
        ("E op_3 60000 0", {"agent": ":30:200", "cycles": ":0:0"}),
        ("X op_4", {"agent": "", "cycles": ""}),
        ("N spent 0 - - - -", {"agent": ":20"}),
        (f"K lost c {TIMES} - - - -", {"agent": ",20,,20"}),
        (f"S another K lost_too c {TIMES} - - - -", {"agent": ",20,,20"}),
        ("T -", {"agent": ":9000"}),
        ("Q - agent 6000000000 0 1700000000000000 usd,day,UTC,spend", {}),
        (f"K gone o {TIMES} - - - -", {"agent": ",20,,"}),
    ]
    for head, parts in calls:
        with server.client() as other:
            wire = Wire(other)
            op = wire.op(head, **parts)
            _, wire.keys, _ = encode_batch(wire.session.keys, wire.session.header, [op])
            strict(wire)
            [line] = wire.send(op)
            assert line[0] in "gpdkex", (head, line)
    client.hdel("ktrdr:{t}:meta", "recovering_until")  # set by the replays among the requests
    fast = setup.commit("op_6", counted={"agent": 150, "cycles": 1}, agent=70, cycles=1)
    ops = [fast, setup.op("R newer 60000 c - - -", agent=":150")]
    _, setup.keys, _ = encode_batch(setup.session.keys, setup.session.header, ops, use_fast_path=True)
    with server.client() as other:
        setup.client = other
        strict(setup)
        assert setup.send(*ops, fast=True) == ["k", "g"]
    client.acl_deluser("strict")


# -- scripts that the server has not loaded ----------------------------------------------------------------------------


async def test_calls_succeed_after_the_server_has_flushed_its_scripts_unlike_in_pyratelimiter(server, client):
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "5.00")]) as limiter:
        for turn in range(3):
            for call in (
                lambda: limiter.reserve("agent", "0.15", id=f"op_{turn}"),  # noqa: B023 -- called at once
                lambda: limiter.extend(f"op_{turn}"),  # noqa: B023
                lambda: limiter.commit(f"op_{turn}", "0.07"),  # noqa: B023
                lambda: limiter.record("agent", "0.02"),
                lambda: limiter.status("agent"),
                lambda: limiter.set_limit("agent", "6.00"),
            ):
                client.script_flush()
                await call()
        assert str((await limiter.status("agent")).spent) == "0.27"
        assert limiter.losses == 0


def test_a_commit_succeeds_after_a_restart_of_the_server_unlike_in_pyratelimiter(start_server: Callable):
    server = start_server(None, "--appendonly", "yes")
    with BudgetLimiter(server.url, [Budget("agent", "5.00")], timeout=10.0) as limiter:
        hold = limiter.reserve("agent", "0.15")
        server.kill()
        server.start()
        assert str(hold.commit("0.07").amounts["agent"]) == "0.07"
        assert limiter.losses == 0
    server.kill()


def test_the_readiness_check_tries_every_command_that_any_script_runs():
    sources = {path.stem: path.read_text(encoding="utf-8") for path in LUA.glob("*.lua")}
    tried = set(re.findall(r"\{ '([A-Z]+)'", sources.pop("readiness")))
    run = {command for source in sources.values() for command in re.findall(r"\b[p]?call\('([A-Z]+)'", source)}
    assert len(run) > 20
    assert run <= tried


def test_a_readiness_check_leaves_no_key_if_the_store_refuses_a_command(client):
    keys = Keys("t").trial
    client.execute_command("ACL", "SETUSER", "default", "-zrem")
    try:
        refused = client.eval(scripts.script(scripts.READINESS).source, len(keys), *keys)
        assert refused == ["ZREM", ""]
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+@all")
    client.set("filler", "x" * 2_000_000)
    client.config_set("maxmemory", "1mb")
    try:
        refused = client.eval(scripts.script(scripts.READINESS).source, len(keys), *keys)
        assert refused[0] == "SET"
        assert refused[1].startswith("OOM ")
    finally:
        client.config_set("maxmemory", "0")
        client.delete("filler")
    assert client.dbsize() == 0
