"""Log records of spend and denials. Each has a message for people and extra fields for log processors."""

from __future__ import annotations

import logging
from decimal import Decimal

from ktrdr_budget.models import Denial, Status
from ktrdr_budget.money import Amount, format_amount

__all__ = ["log_denial", "log_exhausted", "log_spend", "logs_spend"]

logger = logging.getLogger("ktrdr_budget")

_TEXT_CHARACTERS = 256


def logs_spend() -> bool:
    """Whether :func:`log_spend` writes a record. If not, the caller need not read the budget's status for it."""
    return logger.isEnabledFor(logging.INFO)


def log_spend(amount: Amount, operation_id: str, status: Status | None) -> None:
    """Log spend: ``Budget spend recorded: $0.07 for op_1 (total: $0.15, remaining: $4.85)``.

    Args:
        status: the status after the spend. If ``None``, total and remainder are logged as unknown.
    """
    total = remaining = "unknown"
    if status is not None:
        total, remaining = format_amount(status.spent), format_amount(status.remaining)
    logger.info(
        "Budget spend recorded: %s for %s (total: %s, remaining: %s)",
        format_amount(amount),
        one_line(operation_id),
        total,
        remaining,
        extra={
            "amount": float(amount),
            "operation_id": one_line(operation_id),
            "total_spend": None if status is None else float(status.spent),
            "remaining": None if status is None else _number(status.remaining),
        },
    )


def log_exhausted(operation_id: str, denial: Denial, summary: str) -> None:
    """Log that the budget denied a research cycle.

    Example: ``Budget exhausted: budget_exhausted ($0.01 remaining, need $0.15)``.

    Args:
        summary: the text that the caller receives; ``denial.reason`` may be more specific.
    """
    logger.warning(
        "Budget exhausted: %s",
        summary,
        extra={
            "operation_id": operation_id,
            "reason": "budget_exhausted",
            "denial_reason": denial.reason,
            "remaining": _number(denial.remaining),
            "requested": _number(denial.requested),
        },
    )


def log_denial(denial: Denial, window: str) -> None:
    """Log the first denial in a window: ``Reservation denied: team: budget_exhausted (…)``."""
    logger.warning(
        "Reservation denied: %s; further denials in window %s are not logged",
        denial.message,
        window,
        extra={
            "budget": denial.budget,
            "window": window,
            "reason": denial.reason,
            "remaining": _number(denial.remaining),
            "requested": _number(denial.requested),
        },
    )


def one_line(text: str) -> str:
    """Replace line breaks and control characters in external text; cut it to 256 characters."""
    return "".join(character if character.isprintable() else "?" for character in text[:_TEXT_CHARACTERS])


def _number(amount: Amount | None) -> float | int | None:
    return float(amount) if isinstance(amount, Decimal) else amount
