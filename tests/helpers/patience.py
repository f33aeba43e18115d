"""Timeouts for a busy machine: calls to a reachable store of this test run have at least twenty seconds.

The ``timeout`` of a limiter applies while its store is unreachable (killed, paused or cut off by the test). It always
applies if the store is outside of this test run. So a test about an outage can have a short deadline, and a machine
that stalls for seconds before or after the outage does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from ktrdr_budget.engine.engine import Engine, on_creation
from ktrdr_budget.limiter import LimiterBase

PATIENT_S = 20.0

_present: set[str] = set()
"""URLs of reachable stores."""
_timeouts_s: WeakKeyDictionary[Engine, float] = WeakKeyDictionary()
"""The timeout that each limiter of this process was given."""


def is_there(url: str) -> None:
    """Mark a store as reachable."""
    _present.add(url)
    _apply_timeouts(url)


def is_away(url: str) -> None:
    """Mark a store as unreachable."""
    _present.discard(url)
    _apply_timeouts(url)


@contextmanager
def away(url: str) -> Iterator[None]:
    """Mark a store as unreachable during the block."""
    is_away(url)
    try:
        yield
    finally:
        is_there(url)


def set_timeout(limiter: LimiterBase, timeout_s: float) -> None:
    """Set the timeout of a limiter's calls, for stores that are not marked as reachable."""
    _timeouts_s[limiter.engine] = timeout_s
    _apply_timeout(limiter.engine)


@contextmanager
def hurried(limiter: LimiterBase, timeout_s: float) -> Iterator[None]:
    """Set the timeout of a limiter's calls during the block, for stores that are not marked as reachable."""
    timeout_set_s = _timeouts_s[limiter.engine]
    set_timeout(limiter, timeout_s)
    try:
        yield
    finally:
        set_timeout(limiter, timeout_set_s)


@contextmanager
def in_haste(limiter: LimiterBase, timeout_s: float) -> Iterator[None]:
    """Set the timeout of a limiter's calls during the block, and treat its store as unreachable."""
    with away(_url(limiter.engine)), hurried(limiter, timeout_s):
        yield


@contextmanager
def patience() -> Iterator[None]:
    """Apply the timeouts of this module to each limiter that is made during the block."""
    on_creation.append(_begin)
    try:
        yield
    finally:
        on_creation.remove(_begin)


def _begin(engine: Engine) -> None:
    _timeouts_s[engine] = engine.dispatcher.timeout_s
    _apply_timeout(engine)


def _apply_timeouts(url: str) -> None:
    for engine in list(_timeouts_s):
        if _url(engine) == url:
            _apply_timeout(engine)


def _apply_timeout(engine: Engine) -> None:
    timeout_s = _timeouts_s[engine]
    engine.set_timeout(max(timeout_s, PATIENT_S) if _url(engine) in _present else timeout_s)


def _url(engine: Engine) -> str:
    return (engine.store.address or "").partition("?")[0]
