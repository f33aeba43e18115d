"""A tracker of one daily budget that all replicas share. Its methods are those of a tracker that is not shared."""

from __future__ import annotations

import logging
import math
import os
import threading
from contextlib import AbstractContextManager
from decimal import Decimal
from types import TracebackType
from typing import Any

from ktrdr_budget import environment
from ktrdr_budget.engine.replica.hold import OnError
from ktrdr_budget.engine.transport.credentials import CredentialSource
from ktrdr_budget.errors import DefinitionConflict, StoreUnavailable
from ktrdr_budget.events import log_spend, logs_spend
from ktrdr_budget.models import TTL_DEFAULT_S, OnExpiry, Status
from ktrdr_budget.money import AmountIn, format_amount, from_units, to_units
from ktrdr_budget.sync import BudgetLimiter, Hold

__all__ = ["BudgetTracker", "get_budget_tracker"]

logger = logging.getLogger("ktrdr_budget")

_BUDGET = "agent"
_LABEL_CHARACTERS = 256


class BudgetTracker:
    """A daily budget in dollars that all processes with the same store share. Threads may share a tracker.

    Between ``can_spend`` and ``record_spend``, other processes may spend. :meth:`reserve` checks the budget and holds
    the amount atomically.

    Args:
        daily_limit: the limit in dollars. By default, the value of ``AGENT_DAILY_BUDGET``: an amount or ``unlimited``;
            5.00 if it is not set.
        data_dir: the data directory of the embedded server; by default ``AGENT_BUDGET_DIR`` (``data/budget``).
        url: the URL of the store. By default, the embedded server is used if ``data_dir`` is given or
            ``KTRDR_REDIS_URL`` is not set; otherwise the store of ``KTRDR_REDIS_URL`` is used.
        credential_provider: the source of the login for each connection to the store; see :class:`AsyncBudgetLimiter`.

    Raises:
        InvalidArgument: an argument or an environment variable is invalid.
    """

    def __init__(
        self,
        daily_limit: AmountIn | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        url: str | None = None,
        *,
        credential_provider: CredentialSource | None = None,
    ) -> None:
        environment.check_names()
        limit = environment.daily_limit() if daily_limit is None else from_units(to_units(daily_limit, round_down=True))
        self._limit = limit
        self.daily_limit: float | None = None if limit is None else float(limit)
        """Configured limit in dollars; ``None`` if unlimited. :meth:`get_status` has the limit in force."""
        if limit == 0:
            logger.warning("%s", environment.ZERO_BUDGET)
        self.cycle_estimate = environment.cycle_estimate()
        """Expected cost of one cycle, in dollars."""
        if url is None and data_dir is None:
            url = environment.store_url()
        self.limiter = BudgetLimiter(
            url,
            [environment.agent_budget(limit)],
            tenant=environment.tenant(),
            data_dir=environment.data_dir() if data_dir is None else data_dir,
            credential_provider=credential_provider,
            **environment.limiter_options(),
        )
        """The underlying limiter, with the complete interface."""

    def __repr__(self) -> str:
        return f"<BudgetTracker {format_amount(self._limit)} a day, {self.limiter!r}>"

    def __enter__(self) -> BudgetTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect from the store. An embedded server stops when its last user disconnects."""
        self.limiter.close()

    # -- figures -------------------------------------------------------------------------------------------------------

    def get_today_spend(self) -> float:
        """Return the dollars spent in today's window.

        Raises:
            StoreUnavailable: the spend is unknown. It must not be taken for 0.
        """
        return float(self._status().spent)

    def get_remaining(self) -> float:
        """Return the dollars that are neither spent nor held today; ``inf`` if the budget is unlimited.

        Raises:
            StoreUnavailable: the remainder is unknown. It must not be taken for the full budget.
        """
        remaining = self._status().remaining
        return math.inf if remaining is None else float(remaining)

    def can_spend(self, estimated_amount: AmountIn = 0.15) -> tuple[bool, str]:
        """Return whether the amount is available now, and why: ``(False, "budget_exhausted ($0.10 remaining, …)")``.

        The amount is not held. If the store does not reply, or has another definition of the budget, the result is
        ``(False, "budget_unavailable (…)")``.
        """
        amount = from_units(to_units(estimated_amount))
        try:
            remaining = self._status().remaining
        except (StoreUnavailable, DefinitionConflict) as error:
            return False, f"budget_unavailable ({error})"
        if remaining is None or amount <= remaining:
            return True, "ok"
        return False, f"budget_exhausted ({format_amount(remaining)} remaining, need {format_amount(amount)})"

    def get_status(self) -> dict[str, Any]:
        """Return ``date, daily_limit, today_spend, remaining, cycles_affordable, spend_events`` as a dict."""
        status = self._status()
        remaining, limit = status.remaining, status.limit
        return {
            "date": status.window,
            "daily_limit": None if limit is None else float(limit),
            "today_spend": float(status.spent),
            "remaining": None if remaining is None else float(remaining),
            "cycles_affordable": None if remaining is None else int(Decimal(remaining) // Decimal(self.cycle_estimate)),
            "spend_events": status.events,
        }

    # -- spend ---------------------------------------------------------------------------------------------------------

    def record_spend(self, amount: AmountIn, operation_id: str) -> None:
        """Record spend. ``operation_id`` is a label, not an idempotency key: a second call records a second entry.

        The ledger keeps the first 256 characters of the label. If the log level is INFO or lower, the spend is logged
        with the day's total and remainder.

        Raises:
            InvalidAmount: the amount is not a non-negative number.
            StoreUnavailable: the store did not reply; the spend may have been recorded.
        """
        label = _label(operation_id)
        recorded = self.limiter.record(_BUDGET, amount, operation=label)
        if logs_spend():
            try:
                status = self._status()
            except (DefinitionConflict, StoreUnavailable):
                status = None
            log_spend(recorded.amounts[_BUDGET], label, status)

    def reserve(
        self,
        estimated_amount: AmountIn = 0.15,
        operation_id: str = "",
        *,
        id: str | None = None,
        ttl: float = TTL_DEFAULT_S,
        on_expiry: OnExpiry = "charge",
    ) -> Hold:
        """Check the budget and hold an amount atomically.

        Settle the hold with ``hold.commit(cost)`` or ``hold.release()``.

        Raises:
            BudgetExceeded: the remaining budget is smaller than the amount.
            StoreUnavailable: the store did not reply.
        """
        return self.limiter.reserve(
            _BUDGET, estimated_amount, id=id, ttl=ttl, on_expiry=on_expiry, operation=operation_id
        )

    def hold(
        self,
        estimated_amount: AmountIn = 0.15,
        operation_id: str = "",
        *,
        id: str | None = None,
        ttl: float = TTL_DEFAULT_S,
        on_expiry: OnExpiry = "charge",
        on_error: OnError = "release",
    ) -> AbstractContextManager[Hold]:
        """Hold an amount for the block ``with tracker.hold(...) as hold``; see :meth:`AsyncBudgetLimiter.hold`."""
        return self.limiter.hold(
            _BUDGET,
            estimated_amount,
            id=id,
            ttl=ttl,
            on_expiry=on_expiry,
            on_error=on_error,
            operation=operation_id,
        )

    # -- internals -----------------------------------------------------------------------------------------------------

    def _status(self) -> Status:
        return self.limiter.status(_BUDGET, complete=True)


def _label(operation_id: object) -> str:
    """Convert any operation id to a label for the ledger, so that spend with an invalid id is still recorded."""
    text = "" if operation_id is None else str(operation_id)
    return text.encode(errors="replace").decode()[:_LABEL_CHARACTERS]


_tracker: BudgetTracker | None = None
_tracker_lock = threading.Lock()


def get_budget_tracker() -> BudgetTracker:
    """Return the tracker of this process. The first call creates the tracker from the environment variables."""
    global _tracker
    with _tracker_lock:
        if _tracker is None:
            _tracker = BudgetTracker()
        return _tracker
