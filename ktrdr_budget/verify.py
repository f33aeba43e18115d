"""Checks on a live store that every window adds up (P11).

``spent + unconfirmed`` is the sum of a window's ledger, ``held`` the sum of its open holds. Concurrent writers raise no
false alarm: the sums, the end of the ledger and the ids of all open holds are taken in one step. Ledger entries never
change, and a hold record keeps what it counted, and since when, also after it was settled: so both are read afterwards,
page by page. What did change in between (a hold that grew, a ledger that was shortened) is looked at again; if that
never ends, the window is reported as inconclusive, not as wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ktrdr_budget.engine.keys import Keys
from ktrdr_budget.engine.protocol import parse_record
from ktrdr_budget.engine.scripts import VERIFY, script
from ktrdr_budget.engine.store import check_url, mask_url
from ktrdr_budget.errors import StoreError, StoreUnavailable
from ktrdr_budget.models import Budget, check_name

__all__ = ["WindowReport", "verify"]

_LOOKS = 5
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class WindowReport:
    """What a window says, and what its ledger and its open holds add up to; in nano-dollars or counts."""

    window_key: str
    budget: str
    window: str
    unit: str
    spent: int
    held: int
    unconfirmed: int
    ledger_sum: int
    holds_sum: int
    conclusive: bool
    """False if writers were so busy that no two looks agreed on what to compare."""

    @property
    def adds_up(self) -> bool:
        """Whether both sums are right (also if inconclusive: there is no evidence against it)."""
        if not self.conclusive:
            return True
        return self.spent + self.unconfirmed == self.ledger_sum and self.held == self.holds_sum


def verify(
    url: str,
    tenant: str = "default",
    budgets: Sequence[Budget] | None = None,
    *,
    windows: Collection[tuple[str, str]] | None = None,
    timeout: float = 5.0,
) -> list[WindowReport]:
    """Checks every window of the tenant that is in the store, or only those of ``budgets``. Writes nothing.

    Args:
        windows: only these, each a budget and its window's name, without looking for others.
        timeout: seconds that one answer of the store may take.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    import redis

    check_url(url)
    keys = Keys(check_name(tenant, "tenant"))
    names = None if budgets is None else {budget.name for budget in budgets}
    cluster = "+cluster" in url
    make: Any = redis.RedisCluster.from_url if cluster else redis.Redis.from_url
    try:
        with make(url.replace("+cluster", ""), socket_timeout=timeout, socket_connect_timeout=timeout) as client:
            found = sorted(_windows(client, keys, cluster) if windows is None else windows)
            return [_check(client, keys, *window) for window in found if names is None or window[0] in names]
    except ValueError:
        raise StoreError(f"store at {mask_url(url)}: something there was not written by ktrdr-budget") from None
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise StoreUnavailable(f"store at {mask_url(url)}: {type(error).__name__}") from None
    except redis.RedisError as error:
        raise StoreError(f"store at {mask_url(url)}: {error}") from None


def _windows(client: Any, keys: Keys, cluster: bool) -> Iterator[tuple[str, str]]:
    """Budget and window of each window in the store."""
    prefix = keys.window("", "")[:-1]
    pattern = "".join(f"[{letter}]" if letter in "*?[]" else letter for letter in prefix) + "*"
    options = {"target_nodes": client.get_node_from_key(prefix)} if cluster else {}
    for key in client.scan_iter(match=pattern, count=1000, **options):
        budget, _, window = key.decode().removeprefix(prefix).rpartition(":")
        yield budget, window


def _check(client: Any, keys: Keys, budget: str, window: str) -> WindowReport:
    report = _look(client, keys, budget, window)
    for _ in range(_LOOKS - 1):
        if report.conclusive and report.adds_up:
            break
        report = _look(client, keys, budget, window)
    return report


def _look(client: Any, keys: Keys, budget: str, window: str) -> WindowReport:
    key, ledger = keys.window(budget, window), keys.ledger(budget, window)
    definition = client.hget(key, "def") or b"usd"
    now_us, spent, held, unconfirmed, first, last, open_ids = client.eval(
        script(VERIFY).source, 3, keys.due, key, ledger
    )
    holds_sum, steady = _holds_sum(client, keys, open_ids, f"{budget}:{window}", int(now_us))
    ledger_sum = _ledger_sum(client, ledger, last.decode()) if last else 0
    trimmed = first and client.xrange(ledger, count=1)[:1] and client.xrange(ledger, count=1)[0][0] != first
    return WindowReport(
        window_key=key,
        budget=budget,
        window=window,
        unit=definition.decode().split(",")[0],
        spent=int(spent),
        held=int(held),
        unconfirmed=int(unconfirmed),
        ledger_sum=ledger_sum,
        holds_sum=holds_sum,
        conclusive=steady and not trimmed,
    )


def _ledger_sum(client: Any, ledger: str, last: str) -> int:
    total, start = 0, "-"
    while entries := client.xrange(ledger, min=start, max=last, count=_PAGE):
        total += sum(int(fields[b"a"]) for _, fields in entries)
        start = "(" + entries[-1][0].decode()
    return total


def _holds_sum(client: Any, keys: Keys, ids: Sequence[bytes], name: str, now_us: int) -> tuple[int, bool]:
    """What the holds that were open at ``now_us`` counted in this window then, and whether that can still be told."""
    total, steady = 0, True
    for start in range(0, len(ids), _PAGE):
        page = [keys.hold(hold_id.decode()) for hold_id in ids[start : start + _PAGE]]
        for stored in client.mget(page):
            if stored is None:
                continue
            record = parse_record(stored.decode())
            steady = steady and record.grown_us <= now_us and record.created_us <= now_us
            for segment in record.segments:
                if f"{segment.budget}:{segment.window}" == name:
                    counted = max(segment.reserved, 0 if segment.flag == "s" else segment.accrued)
                    total += counted
    return total, steady
