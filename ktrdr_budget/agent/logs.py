"""Log records of research cycles. They never contain briefs, prompts or replies."""

from __future__ import annotations

import logging

from ktrdr_budget.agent.cycle_store import Progress
from ktrdr_budget.money import Amount, format_amount

__all__ = ["log_cycle_ended", "log_cycle_lost", "log_cycle_started", "log_gate_failed"]

logger = logging.getLogger("ktrdr_budget")


def log_cycle_started(operation_id: str, estimate: Amount, progress: Progress) -> None:
    """Log a line such as ``Cycle started: op_1 (estimate $0.15, model ktrdr-scripted-1)``."""
    bypassed = bool(progress.request.get("bypass_gates"))
    logger.info(
        "Cycle started: %s (estimate %s, model %s%s%s)",
        operation_id,
        format_amount(estimate),
        progress.model,
        f", strategy {progress.strategy_name}" if progress.strategy_name else "",
        ", gates bypassed" if bypassed else "",
        extra={
            "operation_id": operation_id,
            "estimate": float(estimate),
            "model": progress.model,
            "strategy_name": progress.strategy_name,
            "bypass_gates": bypassed,
        },
    )


def log_cycle_ended(
    operation_id: str, outcome: str, reason: str | None, spend: Amount, elapsed_s: float, progress: Progress
) -> None:
    """Log a line such as ``Cycle ended: op_1 completed after 4.0 s, $0.066255``."""
    tokens = sum(progress.tokens.values())
    logger.info(
        "Cycle ended: %s %s%s after %.1f s, %s, %d tokens",
        operation_id,
        outcome,
        f" ({reason})" if reason not in (None, outcome) else "",
        elapsed_s,
        format_amount(spend),
        tokens,
        extra={
            "operation_id": operation_id,
            "outcome": outcome,
            "reason": reason,
            "spend": float(spend),
            "tokens": tokens,
            "phase": progress.phase,
            "elapsed_seconds": round(elapsed_s, 3),
        },
    )


def log_cycle_lost(operation_id: str, elapsed_s: float) -> None:
    """Log the end of a lost cycle: its deadline passed before its worker recorded an end."""
    logger.warning(
        "Cycle ended: %s failed (worker_lost) after %.1f s",
        operation_id,
        elapsed_s,
        extra={
            "operation_id": operation_id,
            "outcome": "failed",
            "reason": "worker_lost",
            "elapsed_seconds": round(elapsed_s, 3),
        },
    )


def log_gate_failed(operation_id: str, gate: str, reason: str) -> None:
    """Log a line such as ``Gate failed: training gate of op_1: accuracy 0.05 < 0.1``."""
    logger.warning(
        "Gate failed: %s gate of %s: %s",
        gate,
        operation_id,
        reason,
        extra={"operation_id": operation_id, "gate": gate, "reason": reason},
    )
