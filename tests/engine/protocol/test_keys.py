"""Names of keys and windows: each tenant has one slot of a cluster, and each definition of a budget its own windows."""

from __future__ import annotations

import pytest
from redis.crc import key_slot

from ktrdr_budget.engine.protocol.keys import Keys, fingerprint, public_window, split_name, stored_window

DAY = "2026-11-30"
DOLLARS, TOKENS = "usd,day,UTC,spend", "tokens,day,UTC,spend"


def all_keys(tenant: str) -> list[str]:
    keys = Keys(tenant)
    of_a_budget = keys.hold("op_1"), keys.window("agent", DAY), keys.ledger("agent", DAY)
    return [*keys.of_writes, *keys.cycles, *keys.trial, *of_a_budget]


def test_all_keys_of_a_tenant_are_in_one_slot_of_a_cluster():
    assert len({key_slot(key.encode()) for key in all_keys("desk")}) == 1
    assert key_slot(all_keys("desk")[0].encode()) != key_slot(all_keys("lab")[0].encode())


def test_all_keys_of_several_tenants_are_different():
    keys = [*all_keys("desk"), *all_keys("lab"), *all_keys("desk:w")]
    assert len(set(keys)) == len(keys)


def test_the_names_of_stored_keys_do_not_change_between_versions():
    keys, stored = Keys("desk"), stored_window(DAY, DOLLARS)
    assert keys.meta == "ktrdr:{desk}:meta"
    assert keys.hold("op_1") == "ktrdr:{desk}:h:op_1"
    assert keys.window("agent", stored) == "ktrdr:{desk}:w:agent:2026-11-30~ays7qj"
    assert keys.ledger("agent", stored) == "ktrdr:{desk}:l:agent:2026-11-30~ays7qj"


def test_windows_of_a_budget_have_the_same_name_only_under_the_same_definition():
    first, second, third = (stored_window(DAY, definition) for definition in (DOLLARS, TOKENS, DOLLARS))
    assert first != second
    assert first == third


@pytest.mark.parametrize("window", [DAY, "2026-11-30T07Z", "2026-W49", "2026-11", "ever"])
def test_the_public_name_of_a_window_has_no_fingerprint(window):
    assert public_window(stored_window(window, DOLLARS)) == window
    assert public_window(window) == window


@pytest.mark.parametrize("budget", ["agent", "user:1", "team/a@b:c"])
def test_a_window_name_is_split_at_its_last_colon_if_the_budget_has_colons(budget):
    stored = stored_window("2026-11-30T07Z", DOLLARS)
    assert split_name(f"{budget}:{stored}") == (budget, stored)


def test_a_fingerprint_is_six_lowercase_letters_or_digits():
    assert len(fingerprint(DOLLARS)) == 6
    assert fingerprint(DOLLARS).isalnum()
    assert fingerprint(DOLLARS).islower()
