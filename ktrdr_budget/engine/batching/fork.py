"""What becomes of limiters in a forked child."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

__all__ = ["keep", "watch"]


class Forked(Protocol):
    """Whatever has a part in a fork."""

    def after_fork(self) -> None:
        """Is called in the child."""


_watched: weakref.WeakSet[Forked] = weakref.WeakSet()
_of_the_parent: list[Any] = []


def watch(forked: Forked) -> None:
    """Tells it in each child, as long as it lives."""
    _watched.add(forked)


def keep(of_the_parent: Any) -> None:
    """Keeps for ever what is the parent's: a connection that is collected takes itself out of the parent's epoll."""
    _of_the_parent.append(of_the_parent)


def _after_fork_in_child() -> None:
    for forked in list(_watched):
        forked.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
