"""A busy machine is no outage: a call to a store of this test run that is there has twenty seconds, whoever says less.

What a limiter is told as its ``timeout`` holds while its store is away, as the server or proxy says that a test has
killed, paused or cut; and for stores that are not of this test run. So the deadline of a test about an outage may be
short, and a machine that stalls for seconds before or after the outage does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ktrdr_budget.engine.batching.background import Background
from ktrdr_budget.engine.batching.dispatcher import Coalescer
from ktrdr_budget.engine.leases.lease import LeaseBase
from ktrdr_budget.limiter import LimiterBase

PATIENT_S = 20.0

_present: set[str] = set()
"""URLs."""


def is_there(url: str) -> None:
    """From now on, this store answers."""
    _present.add(url)


def is_away(url: str) -> None:
    """From now on, it does not."""
    _present.discard(url)


@contextmanager
def away(url: str) -> Iterator[None]:
    """It does not answer meanwhile."""
    is_away(url)
    try:
        yield
    finally:
        is_there(url)


@contextmanager
def hurried(limiter: LimiterBase, timeout_s: float) -> Iterator[None]:
    """Its calls have no more time meanwhile; for stores of which nobody here knows whether they are there."""
    coalescer = limiter._coalescer
    told_s = coalescer._timeout
    coalescer._timeout = coalescer._background.timeout = timeout_s
    try:
        yield
    finally:
        coalescer._timeout = coalescer._background.timeout = told_s


@contextmanager
def in_haste(limiter: LimiterBase, timeout_s: float) -> Iterator[None]:
    """Its calls have no more time meanwhile, though its store is there."""
    with away((limiter.store_address or "").partition("?")[0]), hurried(limiter, timeout_s):
        yield


class _Patient:
    """An attribute: the seconds that a call has."""

    def __init__(self, name: str, store: Any) -> None:
        self._name = name
        self._store = store

    def __get__(self, owner: Any, kind: Any) -> Any:
        if owner is None:
            return self
        told_s = vars(owner)[self._name]
        address = (self._store(owner).address or "").partition("?")[0]
        return max(told_s, PATIENT_S) if address in _present else told_s

    def __set__(self, owner: Any, told_s: float) -> None:
        vars(owner)[self._name] = told_s


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all limiters of this process."""
    for kind, name, store in (
        (Coalescer, "_timeout", lambda coalescer: coalescer._store),
        (Background, "timeout", lambda background: background.store),
        (LeaseBase, "_timeout", lambda lease: lease._core.driver._store),
    ):
        monkeypatch.setattr(kind, name, _Patient(name, store), raising=False)
