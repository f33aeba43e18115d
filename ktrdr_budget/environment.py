"""What the environment says about the daily budget, for those who read it without the service's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from decimal import Decimal

from ktrdr_budget.errors import InvalidAmount, InvalidArgument
from ktrdr_budget.models import Budget, check_name
from ktrdr_budget.money import Amount, from_units, to_units

__all__ = [
    "AGENT",
    "CYCLE_ESTIMATE_DEFAULT",
    "DAILY_BUDGET_DEFAULT",
    "DATA_DIR_DEFAULT",
    "agent_budget",
    "cycle_estimate",
    "daily_limit",
    "data_dir",
    "parse_limit",
    "store_url",
    "tenant",
]

AGENT = "agent"
"""The name of the agent's daily budget."""
DAILY_BUDGET_DEFAULT = Decimal("5.00")
CYCLE_ESTIMATE_DEFAULT = Decimal("0.15")
DATA_DIR_DEFAULT = "data/budget"
UNLIMITED = "unlimited"


def parse_limit(text: str) -> Amount | None:
    """A limit in dollars; ``None`` for ``unlimited``.

    Raises:
        InvalidAmount: neither.
    """
    if text.strip().lower() == UNLIMITED:
        return None
    return from_units(to_units(text.strip(), round_down=True))


def daily_limit(environment: Mapping[str, str] = os.environ) -> Amount | None:
    """``AGENT_DAILY_BUDGET`` (or ``KTRDR_AGENT_DAILY_BUDGET``) in dollars: $5.00 if not set, ``None`` if ``unlimited``.

    Raises:
        InvalidAmount: it is neither an amount nor ``unlimited``.
    """
    for name in ("AGENT_DAILY_BUDGET", "KTRDR_AGENT_DAILY_BUDGET"):
        if text := environment.get(name, "").strip():
            try:
                return parse_limit(text)
            except InvalidAmount as error:
                raise InvalidAmount(f"{name}: {error}") from None
    return DAILY_BUDGET_DEFAULT


def cycle_estimate(environment: Mapping[str, str] = os.environ) -> Amount:
    """``AGENT_CYCLE_ESTIMATE``: what one research cycle is expected to cost, in dollars (0.15)."""
    text = environment.get("AGENT_CYCLE_ESTIMATE", "").strip()
    if not text:
        return CYCLE_ESTIMATE_DEFAULT
    try:
        return from_units(to_units(text, positive=True))
    except InvalidAmount as error:
        raise InvalidAmount(f"AGENT_CYCLE_ESTIMATE: {error}") from None


def agent_budget(limit: Amount | None, environment: Mapping[str, str] = os.environ) -> Budget:
    """The daily budget of the agent, in the timezone of ``AGENT_BUDGET_TIMEZONE`` (UTC)."""
    timezone = environment.get("AGENT_BUDGET_TIMEZONE", "").strip() or "UTC"
    try:
        return Budget(AGENT, limit, timezone=timezone)
    except InvalidArgument as error:
        raise InvalidArgument(f"AGENT_BUDGET_TIMEZONE: {error}") from None


def store_url(environment: Mapping[str, str] = os.environ) -> str | None:
    """``KTRDR_REDIS_URL``; ``None`` is the embedded server."""
    return environment.get("KTRDR_REDIS_URL", "").strip() or None


def tenant(environment: Mapping[str, str] = os.environ) -> str:
    """``KTRDR_TENANT`` (``default``)."""
    return check_name(environment.get("KTRDR_TENANT", "").strip() or "default", "KTRDR_TENANT")


def data_dir(environment: Mapping[str, str] = os.environ) -> str:
    """``AGENT_BUDGET_DIR``: where the embedded server keeps its data (``data/budget``)."""
    return environment.get("AGENT_BUDGET_DIR", "").strip() or DATA_DIR_DEFAULT
