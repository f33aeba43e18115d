"""Periodic audit of the current windows in the live store. Its result is a metric.

A window adds up if its counters equal the sums of its ledger and its open holds (P11 in docs/design.md).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ktrdr_budget.audit import Auditor, WindowReport
from ktrdr_budget.engine.protocol.keys import stored_window
from ktrdr_budget.errors import StoreUnavailable

if TYPE_CHECKING:
    from ktrdr_budget.limiter import AsyncBudgetLimiter

__all__ = ["Audit"]

logger = logging.getLogger("ktrdr_budget")

INTERVAL_S = 60.0
PAUSE_FACTOR = 20
"""The pause after a check is at least this multiple of the check's duration. So long ledgers are checked less often."""


class Audit(Collector):
    """Gauge ``ktrdr_budget_adds_up{budget}``: 1 if the window adds up, 0 if not, absent until the window is checked."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._adds_up: dict[str, bool] = {}
        self._auditor: Auditor | None = None
        self._audited = ("", "")
        self._checking = threading.Lock()
        self._closed = False

    def collect(self) -> Iterator[Metric]:
        """Return the result of the last check."""
        text = "Whether spent and held of the current window are the sums of its ledger and its open holds."
        family = GaugeMetricFamily("ktrdr_budget_adds_up", text, labels=["budget"])
        for budget, adds_up in self._adds_up.items():
            family.add_metric([budget], float(adds_up))
        yield family

    async def run(self, limiter: AsyncBudgetLimiter) -> None:
        """Check periodically, until the task is cancelled."""
        self._closed = False
        try:
            await self._run(limiter)
        finally:
            self.close()

    async def _run(self, limiter: AsyncBudgetLimiter) -> None:
        while True:
            started = time.monotonic()
            try:
                await self.check(limiter)
            except StoreUnavailable:
                self._adds_up = {}  # while the result is unknown, the metric is absent
            except Exception:
                logger.exception("audit of the current windows failed")
                self._adds_up = {}
            await asyncio.sleep(max(self._interval_s, PAUSE_FACTOR * (time.monotonic() - started)))

    async def check(self, limiter: AsyncBudgetLimiter) -> None:
        """Check the current windows once.

        Raises:
            StoreUnavailable: the store does not reply.
        """
        windows = [
            (status.budget, stored_window(status.window, limiter.budgets[status.budget].definition))
            for status in await limiter.statuses(complete=True)
        ]
        address = limiter.store_address
        if address is None:
            return
        found = {}
        for report in await asyncio.to_thread(self._reports, limiter, address, windows):
            if report.conclusive:
                found[report.budget] = report.adds_up
                if not report.adds_up:
                    logger.error("window %s does not add up: %s", report.window_key, report)
        self._adds_up = found

    def close(self) -> None:
        """Disconnect from the store. If a check is in progress, the check disconnects when it ends."""
        self._closed = True
        if self._checking.acquire(blocking=False):
            self._disconnect()
            self._checking.release()

    def _reports(
        self, limiter: AsyncBudgetLimiter, address: str, windows: Collection[tuple[str, str]]
    ) -> Sequence[WindowReport]:
        """Run one check. It blocks, so :meth:`check` calls it in a thread."""
        with self._checking:
            try:
                audited = address, limiter.tenant
                if self._auditor is None or self._audited != audited:
                    self._disconnect()
                    self._auditor = Auditor(*audited, credential_provider=limiter.store_credentials)
                    self._audited = audited
                return self._auditor.check(windows=windows)
            finally:
                if self._closed:
                    self._disconnect()

    def _disconnect(self) -> None:
        auditor, self._auditor = self._auditor, None
        if auditor is not None:
            auditor.close()
