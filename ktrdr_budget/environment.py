"""The names of all environment variables, and parsers for the variables that are not settings of the HTTP service."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Literal, TypedDict, cast

from ktrdr_budget.errors import InvalidAmount, InvalidArgument
from ktrdr_budget.models import Budget, check_name
from ktrdr_budget.money import Amount, from_units, to_units

__all__ = [
    "AGENT",
    "CYCLE_ESTIMATE_DEFAULT",
    "DAILY_BUDGET_DEFAULT",
    "DATA_DIR_DEFAULT",
    "VARIABLES",
    "ZERO_BUDGET",
    "agent_budget",
    "check_names",
    "cycle_estimate",
    "daily_limit",
    "data_dir",
    "limiter_options",
    "parse_limit",
    "store_url",
    "tenant",
]

logger = logging.getLogger("ktrdr_budget")

AGENT = "agent"
"""The name of the agent's daily budget."""
DAILY_BUDGET_DEFAULT = Decimal("5.00")
CYCLE_ESTIMATE_DEFAULT = Decimal("0.15")
DATA_DIR_DEFAULT = "data/budget"
UNLIMITED = "unlimited"
ZERO_BUDGET = (
    "a daily budget of 0 (AGENT_DAILY_BUDGET=0) denies all spending; to run without a limit, set"
    " AGENT_DAILY_BUDGET=unlimited"
)
"""The warning at the start if the budget is 0. In other backends, 0 means "no limit"."""
VARIABLES = (
    "KTRDR_ADMIN_KEY",
    "KTRDR_AGENT_DAILY_BUDGET",
    "KTRDR_API_KEY",
    "KTRDR_API_URL",
    "KTRDR_AUTH",
    "KTRDR_BUDGETS_FILE",
    "KTRDR_DURABILITY",
    "KTRDR_FIXED_CALL_COST",
    "KTRDR_LEASE_SLAB",
    "KTRDR_MAX_BUDGETS",
    "KTRDR_MAX_HOLDS",
    "KTRDR_ON_STORE_ERROR",
    "KTRDR_PRICES_FILE",
    "KTRDR_REDIS_URL",
    "KTRDR_RETENTION_DAYS",
    "KTRDR_TENANT",
    "KTRDR_TIMEOUT",
)
"""Variables of the service, the command and the library that have the prefix ``KTRDR_``."""
_OF_TOOLS = ("KTRDR_EXTRAS", "KTRDR_REDIS_PASSWORD", "KTRDR_REPLICAS")
"""Variables that only ``docker-compose.yml``, ``docker/`` and ``scripts/`` use. They do not count as unknown."""
_SERVICE_LINK = re.compile(r".*(_SERVICE_.*|_PORT|_PORT_.*)")
"""Variables that Kubernetes sets for each service of a namespace. For a service ``ktrdr-redis``, Kubernetes sets
``KTRDR_REDIS_PORT``, for example."""
_EDITS_MAX = 2
_warned: set[str] = set()


def check_names(environment: Mapping[str, str] = os.environ) -> None:
    """Reject a mistyped ``KTRDR_…`` variable. Other unknown variables are logged in one warning.

    Raises:
        InvalidArgument: an unknown name is within two edits of a known one.
    """
    given = (name for name in environment if name.startswith("KTRDR_"))
    unknown = sorted(
        name for name in given if name not in VARIABLES and name not in _OF_TOOLS and not _SERVICE_LINK.fullmatch(name)
    )
    for name in unknown:
        nearest = min(VARIABLES, key=lambda known: _edits(name, known))
        if _edits(name, nearest) <= _EDITS_MAX:
            raise InvalidArgument(f"unknown environment variable {name}: did you mean {nearest}?")
    new = [name for name in unknown if name not in _warned]
    if new:
        _warned.update(new)
        logger.warning("unknown environment variables ignored: %s", ", ".join(new))


def _edits(one: str, other: str) -> int:
    """Return the edit distance: the number of characters inserted, deleted or replaced."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, row = row, [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted)))
    return row[-1]


def parse_limit(text: str) -> Amount | None:
    """Parse a limit in dollars; return ``None`` for the text ``unlimited``.

    Raises:
        InvalidAmount: the text is neither an amount nor ``unlimited``.
    """
    if text.strip().lower() == UNLIMITED:
        return None
    return from_units(to_units(text.strip(), round_down=True))


def daily_limit(environment: Mapping[str, str] = os.environ) -> Amount | None:
    """Read ``AGENT_DAILY_BUDGET`` (or ``KTRDR_AGENT_DAILY_BUDGET``): dollars, by default 5.00; ``None`` if unlimited.

    Raises:
        InvalidAmount: the value is neither an amount nor ``unlimited``.
    """
    for name in ("AGENT_DAILY_BUDGET", "KTRDR_AGENT_DAILY_BUDGET"):
        if text := environment.get(name, "").strip():
            try:
                return parse_limit(text)
            except InvalidAmount as error:
                raise InvalidAmount(f"{name}: {error}") from None
    return DAILY_BUDGET_DEFAULT


def cycle_estimate(environment: Mapping[str, str] = os.environ) -> Amount:
    """Read ``AGENT_CYCLE_ESTIMATE``: the expected cost of a research cycle, in dollars (default: 0.15)."""
    text = environment.get("AGENT_CYCLE_ESTIMATE", "").strip()
    if not text:
        return CYCLE_ESTIMATE_DEFAULT
    try:
        return from_units(to_units(text, positive=True))
    except InvalidAmount as error:
        raise InvalidAmount(f"AGENT_CYCLE_ESTIMATE: {error}") from None


def agent_budget(limit: Amount | None, environment: Mapping[str, str] = os.environ) -> Budget:
    """Create the agent's daily budget. Its timezone is read from ``AGENT_BUDGET_TIMEZONE`` (default: UTC)."""
    timezone = environment.get("AGENT_BUDGET_TIMEZONE", "").strip() or "UTC"
    try:
        return Budget(AGENT, limit, timezone=timezone)
    except InvalidArgument as error:
        raise InvalidArgument(f"AGENT_BUDGET_TIMEZONE: {error}") from None


def store_url(environment: Mapping[str, str] = os.environ) -> str | None:
    """Read ``KTRDR_REDIS_URL``. If it is not set, return ``None``, which means the embedded server.

    Raises:
        InvalidArgument: the variable is set but empty. This is probably a mistake, and with an embedded server each
            replica would have its own cap.
    """
    url = environment.get("KTRDR_REDIS_URL")
    if url is None:
        return None
    if not url.strip():
        raise InvalidArgument(
            "KTRDR_REDIS_URL is set but empty: set it to the store's URL, or unset it to use an embedded server"
        )
    return url.strip()


def tenant(environment: Mapping[str, str] = os.environ) -> str:
    """Read ``KTRDR_TENANT``: the tenant's name (default: ``default``)."""
    return check_name(environment.get("KTRDR_TENANT", "").strip() or "default", "KTRDR_TENANT")


class LimiterOptions(TypedDict, total=False):
    """Options of a limiter that environment variables can set."""

    max_holds: int
    max_budgets: int
    retention_days: int
    timeout: float
    durability: Literal["memory", "replica", "disk"]


def limiter_options(environment: Mapping[str, str] = os.environ) -> LimiterOptions:
    """Read the limiter's options from environment variables.

    The variables are ``KTRDR_MAX_HOLDS``, ``KTRDR_MAX_BUDGETS``, ``KTRDR_RETENTION_DAYS``, ``KTRDR_TIMEOUT`` and
    ``KTRDR_DURABILITY``. The result has no entry for a variable that is not set.

    Raises:
        InvalidArgument: ``KTRDR_DURABILITY`` is not memory, replica or disk, or another variable is not a number.
    """
    found = LimiterOptions()
    if holds := environment.get("KTRDR_MAX_HOLDS", "").strip():
        found["max_holds"] = _whole("KTRDR_MAX_HOLDS", holds)
    if budgets := environment.get("KTRDR_MAX_BUDGETS", "").strip():
        found["max_budgets"] = _whole("KTRDR_MAX_BUDGETS", budgets)
    if days := environment.get("KTRDR_RETENTION_DAYS", "").strip():
        found["retention_days"] = _whole("KTRDR_RETENTION_DAYS", days)
    if timeout := environment.get("KTRDR_TIMEOUT", "").strip():
        found["timeout"] = _seconds("KTRDR_TIMEOUT", timeout)
    if durability := environment.get("KTRDR_DURABILITY", "").strip():
        if durability not in ("memory", "replica", "disk"):
            raise InvalidArgument(f"KTRDR_DURABILITY must be memory, replica or disk, not {durability!r}")
        found["durability"] = cast(Literal["memory", "replica", "disk"], durability)
    return found


def _seconds(name: str, text: str) -> float:
    if not re.fullmatch(r"\d{1,4}(\.\d{1,6})?|\.\d{1,6}", text, re.ASCII):
        raise InvalidArgument(f"{name} must be a number of seconds, not {text!r}")
    return float(text)


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII):
        raise InvalidArgument(f"{name} must be a whole number, not {text!r}")
    return int(text)


def data_dir(environment: Mapping[str, str] = os.environ) -> str:
    """Read ``AGENT_BUDGET_DIR``: the data directory of the embedded server (default: ``data/budget``)."""
    return environment.get("AGENT_BUDGET_DIR", "").strip() or DATA_DIR_DEFAULT
