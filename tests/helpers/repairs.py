"""Waiting for the repair of a data loss."""

from __future__ import annotations

from ktrdr_budget.limiter import LimiterBase

from .waiting import until


async def replayed(limiter: LimiterBase, losses: int = 1) -> None:
    """Wait until a replica has detected its data loss number ``losses`` and has replayed its journal."""
    repair = limiter.engine.dispatcher.repair
    repair.suspect()
    await until(lambda: limiter.losses == losses and not repair.active)
