"""Checks on a live store that every window adds up (P11), and repairs what does not.

``spent + unconfirmed`` is the sum of a window's ledger, ``held`` the sum of its open holds. Concurrent writers raise no
false alarm: the sums, the end of the ledger and the ids of all open holds are taken in one step. Ledger entries never
change, and a hold record keeps what it counted, and since when, also after it was settled: so both are read afterwards,
page by page. What did change in between (a hold that grew, a ledger that was shortened) is looked at again; if that
never ends, the window is reported as inconclusive, not as wrong.

A repair needs no pause of the writers either: they change counters, ledger and holds together, so what a counter was
off by at one look it is off by until somebody corrects it (``lua/correct.lua``).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ktrdr_budget.audit.reader import AuditReader, Ledger, WindowSnapshot, connect
from ktrdr_budget.engine.protocol import word
from ktrdr_budget.engine.protocol.keys import Keys, public_window
from ktrdr_budget.engine.transport.credentials import CredentialSource, credentials_for
from ktrdr_budget.engine.transport.errors import meaning, without_secrets
from ktrdr_budget.engine.transport.urls import mask_url, parse_url
from ktrdr_budget.engine.transport.wrong_protocol import probe_protocol
from ktrdr_budget.errors import StoreError, StoreUnavailable
from ktrdr_budget.models import Budget, check_name

__all__ = ["Auditor", "Change", "IndexChange", "Repair", "WindowReport", "verify"]

logger = logging.getLogger("ktrdr_budget")

_LOOKS = 5
_REPAIR_LOOKS = 200
_IDS_LOGGED = 20


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
    unconfirmed_sum: int | None = None
    """What the ledger's unresolved expiries add up to; ``None`` if a part of the ledger was carried forward."""
    fault: str = ""
    """Why it cannot be read, such as a key of another type; then its figures are unknown, and it is not conclusive."""

    @property
    def adds_up(self) -> bool:
        """Whether the sums are right (also if inconclusive: there is no evidence against it)."""
        if self.fault:
            return False
        if not self.conclusive:
            return True
        parted = self.unconfirmed_sum is None or self.unconfirmed == self.unconfirmed_sum
        return self.spent + self.unconfirmed == self.ledger_sum and self.held == self.holds_sum and parted


@dataclass(frozen=True, slots=True)
class Change:
    """A counter that was corrected; in nano-dollars or counts."""

    budget: str
    window: str
    unit: str
    counter: str
    """``spent``, ``held``, ``unconfirmed`` or ``events``; ``ledger`` if it was the ledger that lacked something."""
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class IndexChange:
    """An entry that was added to an index of holds, or removed from it."""

    index: str
    """``due`` or ``unconfirmed``."""
    hold_id: str
    added: bool


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair changed, and how the windows are after it."""

    windows: list[WindowReport]
    changes: list[Change] = field(default_factory=list)
    index_changes: list[IndexChange] = field(default_factory=list)


def verify(
    url: str,
    tenant: str = "default",
    budgets: Sequence[Budget] | None = None,
    *,
    windows: Collection[tuple[str, str]] | None = None,
    timeout: float = 5.0,
    credential_provider: CredentialSource | None = None,
) -> list[WindowReport]:
    """Checks every window of the tenant that is in the store, or only those of ``budgets``. Writes nothing.

    Args:
        windows: only these, each a budget and its window's name. A name with the fingerprint of its definition, as the
            store has it (:func:`~ktrdr_budget.engine.protocol.keys.stored_window`), is found without a scan for others.
        timeout: seconds that one answer of the store may take.
        credential_provider: as for :class:`~ktrdr_budget.AsyncBudgetLimiter`.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    with Auditor(url, tenant, timeout=timeout, credential_provider=credential_provider) as auditor:
        return auditor.check(budgets, windows=windows)


class Auditor:
    """Checks a tenant's windows again and again, and reads of their ledgers only what is new. For one thread.

    Args:
        url: where the store is.
        timeout: seconds that one answer of the store may take.
        credential_provider: as for :class:`~ktrdr_budget.AsyncBudgetLimiter`.

    Raises:
        InvalidArgument: the URL, the tenant or the provider is not usable.
    """

    def __init__(
        self,
        url: str,
        tenant: str = "default",
        *,
        timeout: float = 5.0,
        credential_provider: CredentialSource | None = None,
    ) -> None:
        self._credentials = credentials_for(credential_provider, parse_url(url))
        self._url = url
        self._keys = Keys(check_name(tenant, "tenant"))
        self._timeout = timeout
        self._client: Any = None
        self._books: AuditReader | None = None

    def __repr__(self) -> str:
        return f"<Auditor {mask_url(self._url)}>"

    def __enter__(self) -> Auditor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnects."""
        client, self._client, self._books = self._client, None, None
        if client is not None:
            client.close()

    def check(
        self, budgets: Sequence[Budget] | None = None, *, windows: Collection[tuple[str, str]] | None = None
    ) -> list[WindowReport]:
        """See :func:`verify`."""
        with self._opened() as books:
            found = self._windows(books, budgets, windows)
            return [self._check(books, *window) for window in found]

    def repair(
        self, budgets: Sequence[Budget] | None = None, *, windows: Collection[tuple[str, str]] | None = None
    ) -> Repair:
        """Rebuilds the indexes of holds from their records, and the counters of windows from ledger and open holds.

        Others may go on writing. Each correction is logged, and leaves an entry ``audit`` of amount 0 in the ledger.

        Raises:
            StoreUnavailable: the store does not answer; what was corrected until then stays so.
        """
        with self._opened() as books:
            repair = Repair([])
            for change, hold_id in books.reindex():
                repair.index_changes.append(IndexChange(change[1:], hold_id, change[0] == "+"))
            for index, added in sorted({(each.index, each.added) for each in repair.index_changes}):
                ids = [each.hold_id for each in repair.index_changes if (each.index, each.added) == (index, added)]
                what = "added to" if added else "removed from"
                told = ", ".join(ids[:_IDS_LOGGED]) + (", …" if len(ids) > _IDS_LOGGED else "")
                logger.warning("repaired: %d holds %s the index %r: %s", len(ids), what, index, told)
            for window in self._windows(books, budgets, windows):
                repair.windows.append(self._repair(books, *window, repair.changes))
            return repair

    # -- inside --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self) -> Iterator[AuditReader]:
        from redis import exceptions as redis

        shown = mask_url(self._url)
        moved = redis.AskError, redis.TryAgainError, redis.ClusterDownError, redis.MasterDownError, redis.ReadOnlyError
        try:
            if self._books is None:
                self._client = connect(self._url, self._keys.meta, self._timeout, self._credentials)
                self._books = AuditReader(self._client, self._keys)
            yield self._books
        except ValueError:
            raise StoreError(f"store at {shown}: something there was not written by ktrdr-budget") from None
        except (redis.AuthenticationError, redis.AuthorizationError) as error:
            raise StoreError(f"store at {shown}: {error}") from None
        except (redis.ConnectionError, redis.TimeoutError, OSError, *moved) as error:
            self.close()  # the store may be elsewhere now
            where = parse_url(self._url)
            foreign = probe_protocol(where.hosts[0], where.tls) if where.hosts else None
            failure = meaning(foreign or error, shown)
            raise (failure if isinstance(failure, StoreError) else StoreUnavailable(str(failure))) from None
        except redis.RedisError as error:
            raise StoreError(f"store at {shown}: {error}") from None

    @staticmethod
    def _windows(
        books: AuditReader, budgets: Sequence[Budget] | None, windows: Collection[tuple[str, str]] | None
    ) -> list[tuple[str, str]]:
        books.check_timeline()
        if windows is not None and all("~" in window for _, window in windows):
            found = sorted(windows)
        else:
            found = [
                (budget, window)
                for budget, window in books.windows()
                if windows is None or (budget, window) in windows or (budget, public_window(window)) in windows
            ]
        books.forget_other_windows(found)
        names = None if budgets is None else {budget.name for budget in budgets}
        return [window for window in found if names is None or window[0] in names]

    def _check(self, books: AuditReader, budget: str, window: str, looks: int = _LOOKS) -> WindowReport:
        while True:
            look = _look(books, budget, window)
            report = self._report(look, budget, window)
            looks -= 1
            if looks <= 0 or (report.conclusive and report.adds_up):
                return report

    def _report(self, look: WindowSnapshot | str, budget: str, window: str) -> WindowReport:
        if isinstance(look, str):
            key, unknown = self._keys.window(budget, window), (0, 0, 0, 0, 0)
            return WindowReport(key, budget, public_window(window), "count", *unknown, conclusive=False, fault=look)
        ledger = look.ledger
        return WindowReport(
            window_key=self._keys.window(budget, window),
            budget=budget,
            window=public_window(window),
            unit=look.unit,
            spent=look.spent,
            held=look.held,
            unconfirmed=look.unconfirmed,
            ledger_sum=0 if ledger is None else ledger.total,
            holds_sum=look.holds_sum or 0,
            conclusive=ledger is not None and look.holds_sum is not None,
            unconfirmed_sum=None if ledger is None or ledger.carried else ledger.unconfirmed,
        )

    def _repair(self, books: AuditReader, budget: str, window: str, changes: list[Change]) -> WindowReport:
        looks = _REPAIR_LOOKS
        while looks > 0:
            looks -= 1
            look = _look(books, budget, window)
            if isinstance(look, str):
                break
            if look.ledger is None:
                continue
            differences, missing = _differences(look, look.ledger)
            if not differences and not missing and not look.vanished:
                if look.holds_sum is not None:
                    return self._report(look, budget, window)
                continue
            if look.holds_sum is None and set(differences) <= {"events"} and not missing:
                continue  # one correction for all that is wrong
            done = books.correct(budget, window, look, differences, missing, _note(differences, missing))
            for counter, (before, after) in (done or {}).items():
                changes.append(Change(budget, public_window(window), look.unit, counter, before, after))
            if done is not None and missing:
                total = look.ledger.total
                changes.append(Change(budget, public_window(window), look.unit, "ledger", total, total + missing))
            if done is not None:
                logger.warning("repaired window %s: %s", self._keys.window(budget, window), _told(done, missing))
        return self._check(books, budget, window)


def _look(books: AuditReader, budget: str, window: str) -> WindowSnapshot | str:
    """A window; or why it cannot be read, which says nothing of the others."""
    from redis import ResponseError

    try:
        return books.look(budget, window)
    except ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        return without_secrets(error)
    except ValueError:
        return "something there was not written by ktrdr-budget"


def _differences(look: WindowSnapshot, ledger: Ledger) -> tuple[dict[str, int], int]:
    """What each counter is off by, and what the ledger lacks.

    The ledger is lacking where it says less was spent than two other sources do: the counter, and the shares of the
    replicas. Then it is the ledger that was damaged, and no money comes back.
    """
    differences: dict[str, int] = {}
    missing = 0
    total = ledger.total
    counted = look.spent + look.unconfirmed
    if counted > total and look.spent == look.shares and look.spent > total - ledger.unconfirmed:
        missing = counted - total
    elif not ledger.carried:
        differences["spent"] = total - ledger.unconfirmed - look.spent
        differences["unconfirmed"] = ledger.unconfirmed - look.unconfirmed
        differences["events"] = ledger.counted - look.events
    elif counted != total:
        # Which of the entries that were carried forward are unconfirmed is not known; what was spent, the replicas say.
        spent = min(look.shares, total)
        differences["spent"] = spent - look.spent
        differences["unconfirmed"] = total - spent - look.unconfirmed
    if look.holds_sum is not None:
        differences["held"] = look.holds_sum - look.held
    return {counter: units for counter, units in differences.items() if units}, missing


def _note(differences: dict[str, int], missing: int) -> str:
    told = [f"{counter} {units:+d}" for counter, units in differences.items()]
    return word(", ".join([*told, *([f"ledger {missing:+d}"] if missing else [])]))


def _told(done: dict[str, tuple[int, int]], missing: int) -> str:
    told = [f"{counter} from {before} to {after}" for counter, (before, after) in done.items()]
    return ", ".join([*told, *([f"ledger by {missing:+d}"] if missing else [])])
