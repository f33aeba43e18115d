"""Replicas in several processes make random calls about the same ids; then the whole history is checked.

The order of the store's decisions cannot be observed, but each decision lies between the start and the end of its call.
So a grant is checked against the least amount that can have counted during the call, and a denial against the most. The
final figures are checked against the acknowledged calls.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from ktrdr_budget.money import to_units

from ..helpers.processes import workers
from .observed import RawStore

LIMITS = {"agent": "50.00", "team": "30.00"}
PROCESSES = 4


@dataclass
class CallsOfId:
    """The acknowledged calls about one id."""

    grants: list[dict] = field(default_factory=list)
    growths: list[dict] = field(default_factory=list)
    settlements: list[dict] = field(default_factory=list)

    def counted(self, budget: str, began: int, ended: int) -> tuple[int, int]:
        """The least and the most that this id can have counted in a budget between two instants, in units."""
        if not self.grants:
            return self._settled(budget, began, ended)
        [grant] = self.grants
        reserved = grant["amounts"].get(budget, 0)
        grown = max((growth["amounts"].get(budget, 0) for growth in self.growths), default=0)
        most = max(reserved, grown)  # the growth may have been decided by then
        low, high = (reserved, most) if grant["ended"] <= began else (0, most if grant["began"] < ended else 0)
        for settlement in self.settlements:
            spent = settlement["settled"].get(budget, 0)
            if settlement["ended"] <= began:
                low = high = spent
            elif settlement["began"] < ended:
                low, high = min(low, spent), max(high, spent)
        return low, high

    def _settled(self, budget: str, began: int, ended: int) -> tuple[int, int]:
        """The least and the most that recorded spend can have counted in a budget between two instants, in units."""
        low = high = 0
        for settlement in self.settlements:
            spent = settlement["settled"].get(budget, 0)
            low += spent if settlement["ended"] <= began else 0
            high += spent if settlement["began"] < ended else 0
        return low, high


def calls_by_id(history: Iterable[dict]) -> dict[str, CallsOfId]:
    """The calls that took effect, without replays, by id."""
    by_id: dict[str, CallsOfId] = defaultdict(CallsOfId)
    for entry in history:
        if entry["call"] == "grow" and entry["reply"] == "done":
            by_id[entry["id"]].growths.append(entry)
        elif entry["reply"] == "done" and entry["call"] == "reserve":
            by_id[entry["id"]].grants.append(entry)
        elif entry["reply"] == "done" and entry["call"] in ("commit", "release", "record"):
            by_id[entry["id"]].settlements.append(entry)
    for calls in by_id.values():
        calls.settlements.sort(key=lambda settlement: (is_final(settlement), settlement["began"]))
    return by_id


def is_final(settlement: dict) -> bool:
    """False for the release of an expired hold by id: the worker of the hold may commit the hold later, once."""
    return not (settlement["call"] == "release" and settlement["late"])


@pytest.fixture
def history(server) -> list[dict]:
    """The calls of all replicas, with their ids, instants and replies."""
    options = {"url": server.url, "limits": LIMITS, "tasks": 8, "calls": 120, "ids": 500}
    options["seed"] = seed = random.randrange(10**9)
    print(f"seed {seed}")
    with workers("historian.py", PROCESSES, options) as historians:
        for historian in historians:
            historian.send(go=True)
        return [entry for historian in historians for entry in historian.receive()]


@pytest.mark.slow
def test_in_random_concurrent_histories_no_grant_exceeds_the_cap_and_each_id_is_applied_once(server, history):
    by_id = calls_by_id(history)
    replies = Counter((entry["call"], entry["reply"]) for entry in history)
    assert min(replies["reserve", word] for word in ("done", "replayed", "BudgetExceeded", "HoldConflict")) > 5, replies
    check_each_id_is_applied_once(history, by_id)
    check_no_grant_exceeds_the_cap(by_id)
    check_each_denial_is_justified(history, by_id)
    with server.client() as client:
        check_final_figures_are_those_acknowledged(RawStore(client), by_id)


def check_each_id_is_applied_once(history: list[dict], by_id: dict[str, CallsOfId]) -> None:
    """P3: each id is granted and settled at most once; each replay has the contents of the call that it repeats."""
    for hold_id, calls in by_id.items():
        assert len(calls.grants) <= 1, (hold_id, calls.grants)
        final = [each for each in calls.settlements if is_final(each)]
        assert len(final) <= 1, (hold_id, calls.settlements)
        assert all(each["began"] < end["ended"] for end in final for each in calls.settlements), (hold_id, calls)
    for entry in history:
        calls = by_id.get(entry["id"], CallsOfId())
        if entry["reply"] != "replayed":
            continue
        done = calls.grants if entry["call"] == "reserve" else calls.settlements
        same = [each for each in done if (each["call"], each["amounts"]) == (entry["call"], entry["amounts"])]
        assert any(entry["ended"] > first["began"] for first in same), (entry, done)


def check_no_grant_exceeds_the_cap(by_id: dict[str, CallsOfId]) -> None:
    """P1: each grant fits the cap, given the least that the other ids can have counted at the decision."""
    for hold_id, calls in by_id.items():
        for grant in calls.grants:
            for budget, units in grant["amounts"].items():
                others = sum(bounds(by_id, budget, grant, but=hold_id)[0])
                assert others + units <= to_units(LIMITS[budget]), (grant, others)


def check_each_denial_is_justified(history: list[dict], by_id: dict[str, CallsOfId]) -> None:
    """P6: some budget had no room, given the most that can have counted at the decision."""
    for denial in history:
        if denial["call"] == "reserve" and denial["reply"] == "BudgetExceeded":
            most = {budget: sum(bounds(by_id, budget, denial)[1]) for budget in denial["amounts"]}
            requested = denial["amounts"].items()
            assert any(most[budget] + units > to_units(LIMITS[budget]) for budget, units in requested), (denial, most)


def bounds(by_id: dict[str, CallsOfId], budget: str, call: dict, but: str = "") -> tuple[list[int], list[int]]:
    """The least and the most that each other id can have counted at the decision of a call, in units."""
    counted = [one.counted(budget, call["began"], call["ended"]) for name, one in by_id.items() if name != but]
    return [low for low, _ in counted], [high for _, high in counted]


def check_final_figures_are_those_acknowledged(store: RawStore, by_id: dict[str, CallsOfId]) -> None:
    """P11 holds, and the sums and ledgers contain exactly the acknowledged spend."""
    store.check_it_adds_up()
    store.check_keys_expire()
    for budget in LIMITS:
        window, ledger = f"{budget}:ever", store.ledgers[f"{budget}:ever"]
        spent = Counter()
        for hold_id, calls in by_id.items():
            for settlement in calls.settlements:
                if settlement["call"] != "release" and budget in settlement["settled"]:
                    spent[hold_id] += settlement["settled"][budget]
        assert store.sums(window)["spent"] == spent.total()
        entered = Counter()
        for entry in ledger:
            entered[entry.hold_id] += entry.units
        expired = {hold_id for hold_id in entered if by_id[hold_id].grants and not by_id[hold_id].settlements}
        assert {hold_id: units for hold_id, units in entered.items() if units and hold_id not in expired} == {
            hold_id: units for hold_id, units in spent.items() if units
        }
