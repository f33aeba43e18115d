"""A busy machine is not an outage: calls to a reachable store of this test run have at least twenty seconds.

The ``timeout`` of a limiter applies while its store is unreachable (killed, paused or cut off by the test), and to
stores outside of this test run. So a test about an outage can have a short deadline, and a machine that stalls for
seconds before or after the outage does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ktrdr_budget.engine.batching.background import Background
from ktrdr_budget.engine.batching.dispatcher import Dispatcher
from ktrdr_budget.engine.calls.chunks import LeaseCalls
from ktrdr_budget.limiter import LimiterBase

PATIENT_S = 20.0

_present: set[str] = set()
"""URLs of reachable stores."""


def is_there(url: str) -> None:
    """Mark a store as reachable."""
    _present.add(url)


def is_away(url: str) -> None:
    """Mark a store as unreachable."""
    _present.discard(url)


@contextmanager
def away(url: str) -> Iterator[None]:
    """Mark a store as unreachable during the block."""
    is_away(url)
    try:
        yield
    finally:
        is_there(url)


@contextmanager
def hurried(limiter: LimiterBase, timeout_s: float) -> Iterator[None]:
    """Set the timeout of a limiter's calls during the block, for stores that are not marked."""
    dispatcher = limiter.engine.dispatcher
    timeout_set_s = dispatcher.timeout_s
    dispatcher.timeout_s = dispatcher.background.timeout_s = timeout_s
    try:
        yield
    finally:
        dispatcher.timeout_s = dispatcher.background.timeout_s = timeout_set_s


@contextmanager
def in_haste(limiter: LimiterBase, timeout_s: float) -> Iterator[None]:
    """Set the timeout of a limiter's calls during the block, although its store is reachable."""
    with away((limiter.store_address or "").partition("?")[0]), hurried(limiter, timeout_s):
        yield


class _Patient:
    """A timeout in seconds, raised for reachable stores."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __get__(self, owner: Any, kind: Any) -> Any:
        if owner is None:
            return self
        timeout_set_s = vars(owner)["timeout_s"]
        address = (self._store(owner).address or "").partition("?")[0]
        return max(timeout_set_s, PATIENT_S) if address in _present else timeout_set_s

    def __set__(self, owner: Any, timeout_set_s: float) -> None:
        vars(owner)["timeout_s"] = timeout_set_s


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the timeouts of all limiters of this process."""
    for kind, store in (
        (Dispatcher, lambda dispatcher: dispatcher.store),
        (Background, lambda background: background.store),
        (LeaseCalls, lambda calls: calls.driver.store),
    ):
        monkeypatch.setattr(kind, "timeout_s", _Patient(store), raising=False)
