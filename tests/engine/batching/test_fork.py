"""A forked child resets the limiters of its parent."""

from __future__ import annotations

import gc
import os
import runpy
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from ktrdr_budget.engine.batching import fork as fork_module


class Limiter:
    """An object with state that a fork invalidates."""

    forks = 0

    def after_fork(self) -> None:
        self.forks += 1


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a copy of the module ``fork``; its hook for a forked child is under ``in_child``."""
    hooks: dict[str, Callable[[], None]] = {}
    monkeypatch.setattr(os, "register_at_fork", lambda **given: hooks.update(given))
    names = runpy.run_path(str(fork_module.__file__))
    return names | {"in_child": hooks["after_in_child"]}


def test_each_watched_object_is_reset_once_in_a_forked_child(fork):
    limiters = Limiter(), Limiter()
    for limiter in (*limiters, limiters[0]):
        fork["watch"](limiter)
    fork["in_child"]()
    assert [limiter.forks for limiter in limiters] == [1, 1]


@pytest.mark.parametrize(("function", "stays"), [("watch", False), ("keep", True)])
def test_a_watched_object_can_be_garbage_collected_but_a_kept_object_cannot(fork, function, stays):
    """A collected connection would remove itself from the parent's epoll."""
    limiter = Limiter()
    fork[function](limiter)
    reference = weakref.ref(limiter)
    del limiter
    gc.collect()
    assert (reference() is not None) is stays
