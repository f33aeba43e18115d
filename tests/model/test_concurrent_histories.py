"""Replicas in several processes make random calls about the same ids; then the whole history is checked.

The order in which the store decided is not known from outside, but each decision lies between the begin and the end of
its call. So every grant is checked against what certainly counted while it was made, every denial against all that may
have counted, and the end against what was acknowledged.
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
class Story:
    """What was acknowledged about one id."""

    grants: list[dict] = field(default_factory=list)
    growths: list[dict] = field(default_factory=list)
    settlements: list[dict] = field(default_factory=list)

    def counted(self, budget: str, began: int, ended: int) -> tuple[int, int]:
        """What this id counted at least, and at most, in a budget at an instant between these two."""
        if not self.grants:
            return self._settled(budget, began, ended)
        [grant] = self.grants
        reserved = grant["amounts"].get(budget, 0)
        grown = max((growth["amounts"].get(budget, 0) for growth in self.growths), default=0)
        # A growth that may have happened; its conflicts and denials changed nothing.
        most = max(reserved, grown)
        low, high = (reserved, most) if grant["ended"] <= began else (0, most if grant["began"] < ended else 0)
        for settlement in self.settlements:
            spent = settlement["told"].get(budget, 0)
            if settlement["ended"] <= began:
                low = high = spent
            elif settlement["began"] < ended:
                low, high = min(low, spent), max(high, spent)
        return low, high

    def _settled(self, budget: str, began: int, ended: int) -> tuple[int, int]:
        """The same for spend that was only recorded."""
        low = high = 0
        for settlement in self.settlements:
            spent = settlement["told"].get(budget, 0)
            low += spent if settlement["ended"] <= began else 0
            high += spent if settlement["began"] < ended else 0
        return low, high


def stories_of(history: Iterable[dict]) -> dict[str, Story]:
    """By id, what was done and not merely repeated."""
    stories: dict[str, Story] = defaultdict(Story)
    for entry in history:
        if entry["call"] == "grow" and entry["reply"] == "done":
            stories[entry["id"]].growths.append(entry)
        elif entry["reply"] == "done" and entry["call"] == "reserve":
            stories[entry["id"]].grants.append(entry)
        elif entry["reply"] == "done" and entry["call"] in ("commit", "release", "record"):
            stories[entry["id"]].settlements.append(entry)
    for story in stories.values():
        story.settlements.sort(key=lambda settlement: settlement["began"])
    return stories


@pytest.fixture
def history(server) -> list[dict]:
    """Who called what about which id, when, and what was said to it."""
    options = {"url": server.url, "limits": LIMITS, "tasks": 8, "calls": 120, "ids": 500}
    options["seed"] = seed = random.randrange(10**9)
    print(f"seed {seed}")
    with workers("historian.py", PROCESSES, options) as historians:
        for historian in historians:
            historian.send(go=True)
        return [entry for historian in historians for entry in historian.receive()]


@pytest.mark.slow
def test_a_concurrent_history_keeps_every_promise(server, history):
    stories = stories_of(history)
    replies = Counter((entry["call"], entry["reply"]) for entry in history)
    assert min(replies["reserve", word] for word in ("done", "replayed", "BudgetExceeded", "HoldConflict")) > 5, replies
    each_id_is_applied_once(history, stories)
    no_grant_passes_the_cap(stories)
    no_denial_is_unfounded(history, stories)
    with server.client() as client:
        the_end_is_what_was_acknowledged(RawStore(client), stories)


def each_id_is_applied_once(history: list[dict], stories: dict[str, Story]) -> None:
    """P3: once granted, once settled; whatever else was called a replay is one of that."""
    for hold_id, story in stories.items():
        assert len(story.grants) <= 1, (hold_id, story.grants)
        # A release by id of a hold that has expired is not final: the worker may yet commit it, once.
        final = [each for each in story.settlements if not (each["call"] == "release" and each["late"])]
        assert len(final) <= 1, (hold_id, story.settlements)
        assert not final or final == story.settlements[-1:], (hold_id, story.settlements)
    for entry in history:
        story = stories.get(entry["id"], Story())
        if entry["reply"] != "replayed":
            continue
        done = story.grants if entry["call"] == "reserve" else story.settlements
        same = [each for each in done if (each["call"], each["amounts"]) == (entry["call"], entry["amounts"])]
        assert any(entry["ended"] > first["began"] for first in same), (entry, done)


def no_grant_passes_the_cap(stories: dict[str, Story]) -> None:
    """P1: with what certainly counted while it was decided, each grant fits."""
    for hold_id, story in stories.items():
        for grant in story.grants:
            for budget, units in grant["amounts"].items():
                others = sum(bounds(stories, budget, grant, but=hold_id)[0])
                assert others + units <= to_units(LIMITS[budget]), (grant, others)


def no_denial_is_unfounded(history: list[dict], stories: dict[str, Story]) -> None:
    """With all that may have counted while it was decided, some budget had no room."""
    for denial in history:
        if denial["call"] == "reserve" and denial["reply"] == "BudgetExceeded":
            most = {budget: sum(bounds(stories, budget, denial)[1]) for budget in denial["amounts"]}
            asked = denial["amounts"].items()
            assert any(most[budget] + units > to_units(LIMITS[budget]) for budget, units in asked), (denial, most)


def bounds(stories: dict[str, Story], budget: str, call: dict, but: str = "") -> tuple[list[int], list[int]]:
    """What each other id counted at least, and at most, while a call was decided."""
    counted = [one.counted(budget, call["began"], call["ended"]) for name, one in stories.items() if name != but]
    return [low for low, _ in counted], [high for _, high in counted]


def the_end_is_what_was_acknowledged(store: RawStore, stories: dict[str, Story]) -> None:
    """P11, and that it is the acknowledged spend that adds up."""
    store.check_it_adds_up()
    store.check_keys_expire()
    for budget in LIMITS:
        window, ledger = f"{budget}:ever", store.ledgers[f"{budget}:ever"]
        spent = Counter()
        for hold_id, story in stories.items():
            for settlement in story.settlements:
                if settlement["call"] != "release" and budget in settlement["told"]:
                    spent[hold_id] += settlement["told"][budget]
        assert store.sums(window)["spent"] == spent.total()
        entered = Counter()
        for entry in ledger:
            entered[entry.hold_id] += entry.units
        expired = {hold_id for hold_id in entered if stories[hold_id].grants and not stories[hold_id].settlements}
        assert {hold_id: units for hold_id, units in entered.items() if units and hold_id not in expired} == {
            hold_id: units for hold_id, units in spent.items() if units
        }
