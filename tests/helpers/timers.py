"""Timers of an event loop."""

from __future__ import annotations

import asyncio


def pending_heartbeats(loop: asyncio.AbstractEventLoop) -> list[str]:
    """The scheduled heartbeats of a loop; asyncio has no public list of its timers."""
    timers = vars(loop)["_scheduled"]
    return [repr(timer) for timer in timers if not timer.cancelled() and "Heartbeat" in repr(timer)]
