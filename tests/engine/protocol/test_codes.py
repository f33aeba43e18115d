"""The letters of the wire protocol; ``test_wire_document.py`` compares them with the document and the scripts."""

from __future__ import annotations

from typing import get_args

from ktrdr_budget.engine.protocol import codes
from ktrdr_budget.models import HoldState, OnExpiry

LETTERS = {name: value for name, value in vars(codes).items() if name.isupper() and isinstance(value, str)}


def test_each_code_is_one_letter_or_digit():
    modes = [*codes.CommitMode, *codes.ReleaseMode, *codes.ExtendMode]
    for letter in [*LETTERS.values(), *modes]:
        assert len(letter) == 1 and letter.isalnum()


def test_parsing_the_letter_of_a_public_hold_state_returns_the_same_state():
    assert set(codes.STATE_CODES) == set(get_args(HoldState))
    for state, letter in codes.STATE_CODES.items():
        assert codes.STATES[letter] == state


def test_a_hold_released_by_an_operator_is_shown_as_released_but_does_not_count_as_settled():
    assert codes.STATES[codes.RELEASED_BY_OPERATOR] == codes.STATES[codes.RELEASED] == "released"
    unsettled = set(codes.STATES) - codes.SETTLED
    assert unsettled == {codes.OPEN, codes.UNCONFIRMED, codes.RELEASED_BY_OPERATOR}


def test_parsing_the_letter_of_an_expiry_policy_returns_the_same_policy():
    assert set(codes.POLICY_CODES) == set(get_args(OnExpiry))
    for policy, letter in codes.POLICY_CODES.items():
        assert codes.POLICIES[letter] == policy
