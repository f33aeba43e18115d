"""Digests of requests: equal for a retry, also after a redefinition, and different for other contents."""

from __future__ import annotations

import pytest

from ktrdr_budget.engine.protocol.digest import request_digest

CENT = 10_000_000
GIVEN = [("agent", 15 * CENT, "usd"), ("tokens", 4000, "tokens")]


def test_the_digest_of_a_request_is_one_word_of_twelve_characters_without_separators_of_records():
    digest = request_digest("reserve", GIVEN, policy="c")
    assert len(digest) == 12
    assert not {*digest} & {*" .!|,;"}


def test_a_request_with_the_same_amounts_in_another_order_has_the_same_digest():
    assert request_digest("record", GIVEN) == request_digest("record", GIVEN[::-1])


def test_a_request_has_the_same_digest_after_the_unit_of_its_budget_was_redefined():
    assert request_digest("record", [("agent", 10**9, "usd")]) == request_digest("record", [("agent", 1, "tokens")])


@pytest.mark.parametrize(
    "other",
    [
        {"call": "record"},
        {"policy": "a"},
        {"scope": ""},
        {"scope": "user=alice"},
        {"amounts": GIVEN[:1]},
        {"amounts": [("agent", 15 * CENT, "usd"), ("tokens", 4001, "tokens")]},
        {"amounts": [("team", 15 * CENT, "usd"), ("tokens", 4000, "tokens")]},
    ],
)
def test_a_request_with_other_contents_has_another_digest(other):
    contents = {"call": "reserve", "amounts": GIVEN, "policy": "c"}
    assert request_digest(**contents) != request_digest(**(contents | other))
