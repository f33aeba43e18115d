"""Whether the books add up, as a metric: checks the current windows on the live store now and then (P11)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ktrdr_budget.errors import StoreUnavailable
from ktrdr_budget.verify import verify

if TYPE_CHECKING:
    from ktrdr_budget.limiter import AsyncBudgetLimiter

__all__ = ["Audit"]

logger = logging.getLogger("ktrdr_budget")

INTERVAL_S = 60.0
PAUSE_FACTOR = 20
"""A check may take a twentieth of the time: long ledgers are checked less often."""


class Audit(Collector):
    """Gauge ``ktrdr_budget_adds_up{budget}``: 1 if the window adds up, 0 if not; absent until it was checked."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._adds_up: dict[str, bool] = {}

    def collect(self) -> Iterator[Metric]:
        """What the last check found."""
        text = "Whether spent and held of the current window are the sums of its ledger and its open holds."
        family = GaugeMetricFamily("ktrdr_budget_adds_up", text, labels=["budget"])
        for budget, adds_up in self._adds_up.items():
            family.add_metric([budget], float(adds_up))
        yield family

    async def run(self, limiter: AsyncBudgetLimiter) -> None:
        """Checks for ever; cancel it to stop."""
        while True:
            started = time.monotonic()
            try:
                await self.check(limiter)
            except StoreUnavailable:
                self._adds_up = {}  # unknown is not fine
            except Exception:
                logger.exception("the check of the books failed")
                self._adds_up = {}
            await asyncio.sleep(max(self._interval_s, PAUSE_FACTOR * (time.monotonic() - started)))

    async def check(self, limiter: AsyncBudgetLimiter) -> None:
        """Checks the current windows once.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        windows = [(status.budget, status.window) for status in await limiter.statuses()]
        address = limiter.store_address
        if address is None:
            return
        found = {}
        for report in await asyncio.to_thread(verify, address, limiter.tenant, windows=windows):
            if report.conclusive:
                found[report.budget] = report.adds_up
                if not report.adds_up:
                    logger.error("window %s does not add up: %s", report.window_key, report)
        self._adds_up = found
