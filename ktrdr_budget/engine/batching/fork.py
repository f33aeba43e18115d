"""Reset the state of limiters in a forked child."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

__all__ = ["keep", "watch"]


class Forked(Protocol):
    """An object with state that a fork invalidates."""

    def after_fork(self) -> None:
        """Reset the state in the child of a fork."""


_watched: weakref.WeakSet[Forked] = weakref.WeakSet()
_of_the_parent: list[Any] = []


def watch(forked: Forked) -> None:
    """Call ``forked.after_fork`` in each forked child, until the object is garbage collected."""
    _watched.add(forked)


def keep(of_the_parent: Any) -> None:
    """In a forked child, keep an object of the parent alive for ever.

    If the child collected a connection of the parent, the connection would remove itself from the parent's epoll.
    """
    _of_the_parent.append(of_the_parent)


def _after_fork_in_child() -> None:
    for forked in list(_watched):
        forked.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
