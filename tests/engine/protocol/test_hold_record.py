"""The record of a hold: the parser reads what the renderer writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.engine.protocol.hold_record import (
    HoldRecord,
    Segment,
    created_us_of,
    deadline_ms_of,
    is_settled,
    is_tombstone,
    join_scope,
    label_words_of,
    parse_record,
    scope_word,
    split_scope,
    unword,
    word,
)

NAMES = st.from_regex(r"[A-Za-z0-9._:/@-]{1,20}", fullmatch=True)
UNITS = st.integers(0, 2**53 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def segments(draw) -> Segment:
    reserved = draw(UNITS)
    base = draw(st.none() | st.integers(1, 2**53 - 1))
    flag = draw(st.sampled_from([*codes.FLAGS]))
    return Segment(flag, draw(NAMES), "2026-11-30~k3f9a1", reserved, draw(UNITS), draw(UNITS), base)


@st.composite
def records(draw) -> HoldRecord:
    request = draw(st.just("") | st.from_regex(r"([\w-]{12}\.)?([0-9a-f]{4}-[0-9]{1,3})?", fullmatch=True))
    fields = draw(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), NAMES, max_size=3))
    parts = draw(st.lists(segments(), min_size=1, max_size=3))
    units = draw(st.none() | st.just([draw(st.sampled_from(["usd", "tokens", "a.b-c"])) for _ in parts]))
    return HoldRecord(
        state=draw(st.sampled_from([*codes.STATES])),
        policy=draw(st.sampled_from([*codes.POLICIES])),
        deadline_ms=draw(st.integers(1, 10**13)),
        created_us=draw(st.integers(1, 10**16)),
        grown_us=draw(st.integers(0, 10**16)),
        owner=draw(TEXTS),
        operation=draw(TEXTS),
        trace_id=draw(TEXTS),
        segments=tuple(parts),
        request=request,
        unreceived=bool(request) and draw(st.booleans()),
        scope=",".join(f"{name}={value}" for name, value in sorted(fields.items())),
        units=tuple(units or ()),
    )


@given(records())
def test_parsing_a_rendered_hold_record_returns_the_same_record(record):
    assert parse_record(record.render()) == record


@given(records(), st.from_regex(r"[0-9a-f]{12}", fullmatch=True))
def test_parsing_a_hold_record_ignores_the_id_of_the_replica_that_settled_the_hold(record, replica):
    assert parse_record(f"{record.render()} {replica}") == record


@given(records())
def test_a_field_read_from_the_text_of_a_record_equals_the_field_of_the_parsed_record(record):
    text = record.render()
    assert is_settled(text) == (record.state in codes.SETTLED)
    assert (deadline_ms_of(text), created_us_of(text)) == (record.deadline_ms, record.created_us)
    operation, trace_id, scope = label_words_of(text).split(" ")
    assert (unword(operation), unword(trace_id)) == (record.operation, record.trace_id)
    assert scope == (record.scope or "-")


@given(TEXTS)
def test_any_label_is_encoded_as_one_word_of_a_hold_record(text):
    encoded = word(text)
    assert encoded
    assert not {*encoded} & {*" |,!\n"}
    assert unword(encoded) == text


def test_a_record_is_a_tombstone_only_if_its_operation_is_an_unescaped_exclamation_mark():
    times = "1764000000000 1764000000000000 0"
    assert is_tombstone(f"r c {times} - ! - -|u,agent:2026-11-30~k3f9a1,,0,,")
    assert not is_tombstone(f"r c {times} - - - -|u,agent:2026-11-30~k3f9a1,,0,,")
    assert not is_tombstone(f"r c {times} - {word('!')} - -|u,agent:2026-11-30~k3f9a1,,0,,")


@pytest.mark.parametrize(
    ("scope", "encoded", "parsed"),
    [
        ("", "-", ("", ())),
        ("team=quant,user=alice", "team=quant,user=alice", ("team=quant,user=alice", ())),
        ("user=alice;usd,tokens", "user=alice;usd,tokens", ("user=alice", ("usd", "tokens"))),
        (";usd", "-;usd", ("", ("usd",))),
    ],
)
def test_the_word_of_a_scope_has_its_fields_and_the_unit_of_each_segment(scope, encoded, parsed):
    assert scope_word(scope) == encoded
    assert split_scope(encoded) == split_scope(scope) == parsed
    assert join_scope(*parsed) == scope


def test_a_hold_view_has_the_fields_of_the_scope_by_name():
    record = parse_record("o c 9 8 0 - - - team=quant,user=a:b/c@d;usd|u,agent:2026-11-30~k3f9a1,,5,,")
    assert record.view("a").scope == {"team": "quant", "user": "a:b/c@d"}


def test_a_request_begins_with_the_digest_of_its_contents():
    head = "o c 9 8 0 me!abc.{name} - - -|u,agent:2026-11-30~k3f9a1,,5,,"
    for name in ("", "0123-1", "0123-1!"):
        assert parse_record(head.format(name=name)).digest == "abc"
    assert parse_record(head.format(name="").replace("!abc.", "!0123-1")).digest == ""
