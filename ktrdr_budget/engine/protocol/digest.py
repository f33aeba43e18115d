"""Digests of requests, by which the store recognizes a retry under an id that the caller chose (P3)."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from typing import Literal

from ktrdr_budget.money import NANOS_PER_USD

__all__ = ["request_digest"]


def request_digest(
    call: Literal["reserve", "record"],
    amounts: Iterable[tuple[str, int, str]],
    *,
    policy: str = "",
    scope: str | None = None,
) -> str:
    """The digest of a request as it was given, in 12 characters. Definitions of budgets do not change it.

    Args:
        amounts: the given names, each with whole units and their unit; of a request by scope, the names are units.
        policy: a code of :data:`~.codes.POLICIES`.
        scope: the fields of the scope as text; ``None`` if the request names its budgets.
    """
    # The same number counts alike in each unit: the unit of a budget may have changed since the first attempt.
    numbers = sorted((name, units if unit == "usd" else units * NANOS_PER_USD) for name, units, unit in amounts)
    contents = repr((call, policy, scope, numbers))
    return urlsafe_b64encode(hashlib.sha256(contents.encode()).digest()[:9]).decode()
