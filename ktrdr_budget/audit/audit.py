"""The audit: it checks that every window of a live store adds up, and repairs the windows that do not.

A window adds up if ``spent + unconfirmed`` equals the sum of its ledger, and ``held`` equals the sum of its open holds
(P11 in docs/design.md).

Concurrent writers cause no false alarm. The counters, the end of the ledger and the ids of all open holds are read in
one step. The ledger entries and the records of the holds are read afterwards, page by page. This is safe: entries never
change, and a hold's record keeps its amounts and the time of their last change, even after settlement. If a hold grew
or the ledger was trimmed in between, the window is read again. If no attempt succeeds, the report is inconclusive,
which is not a failure.

A repair needs no pause of the writers either. Writers change counters, ledger and holds together, so the error of a
counter stays constant from a snapshot to the correction (``lua/correct.lua``).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ktrdr_budget.audit.reader import AuditReader, Ledger, WindowSnapshot, connect
from ktrdr_budget.engine.protocol.hold_record import word
from ktrdr_budget.engine.protocol.keys import Keys, public_window
from ktrdr_budget.engine.transport.credentials import CredentialSource, credentials_for
from ktrdr_budget.engine.transport.errors import translate, without_secrets
from ktrdr_budget.engine.transport.protocol_check import check_protocol
from ktrdr_budget.engine.transport.urls import mask_url, parse_url
from ktrdr_budget.errors import StoreError, StoreUnavailable
from ktrdr_budget.models import Budget, check_name

__all__ = ["Auditor", "Change", "IndexChange", "Repair", "WindowReport", "verify"]

logger = logging.getLogger("ktrdr_budget")

_ATTEMPTS = 5
_REPAIR_ATTEMPTS = 200
_IDS_LOGGED = 20
_FOREIGN_DATA = "it contains data that ktrdr-budget did not write"


@dataclass(frozen=True, slots=True)
class WindowReport:
    """A window's counters, and the sums of its ledger and its open holds. All are in nano-dollars or counts."""

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
    """False if the window changed during every attempt to read it."""
    unconfirmed_sum: int | None = None
    """The ledger's sum of unconfirmed charges; ``None`` if a part of the ledger was trimmed."""
    fault: str = ""
    """Why the window cannot be read, such as a key of another type; its figures are then unknown. Otherwise empty."""

    @property
    def adds_up(self) -> bool:
        """Whether the counters equal the sums. True if the report is inconclusive."""
        if self.fault:
            return False
        if not self.conclusive:
            return True
        split_is_right = self.unconfirmed_sum is None or self.unconfirmed == self.unconfirmed_sum
        return self.spent + self.unconfirmed == self.ledger_sum and self.held == self.holds_sum and split_is_right


@dataclass(frozen=True, slots=True)
class Change:
    """A correction of a counter. The amounts are in nano-dollars or counts."""

    budget: str
    window: str
    unit: str
    counter: str
    """``spent``, ``held``, ``unconfirmed`` or ``events``; ``ledger`` if the ledger lacked entries."""
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class IndexChange:
    """An entry added to an index of holds, or removed from it."""

    index: str
    """``due`` (open holds, by deadline) or ``unconfirmed`` (holds that expired without a settlement)."""
    hold_id: str
    added: bool


@dataclass(frozen=True, slots=True)
class Repair:
    """The changes of a repair, and the windows after it."""

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
    """Check every window of the tenant in the store, or only those of ``budgets``. The check writes nothing.

    Args:
        windows: the windows to check. Each is a pair: a budget's name and a window's name. Default: all windows. If
            every window's name includes the fingerprint of the budget's definition
            (:func:`~ktrdr_budget.engine.protocol.keys.stored_window`), the store is not scanned for windows.
        timeout: the longest wait for one reply of the store, in seconds.
        credential_provider: as for :class:`~ktrdr_budget.AsyncBudgetLimiter`.

    Raises:
        StoreUnavailable: the store does not reply.
    """
    with Auditor(url, tenant, timeout=timeout, credential_provider=credential_provider) as auditor:
        return auditor.check(budgets, windows=windows)


class Auditor:
    """Checks a tenant's windows, and repairs them. An auditor is not thread-safe.

    A repeated check reads only the ledger entries that are new since the last check.

    Args:
        url: the URL of the store.
        timeout: the longest wait for one reply of the store, in seconds.
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
        self._reader: AuditReader | None = None

    def __repr__(self) -> str:
        return f"<Auditor {mask_url(self._url)}>"

    def __enter__(self) -> Auditor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        client, self._client, self._reader = self._client, None, None
        if client is not None:
            client.close()

    def check(
        self, budgets: Sequence[Budget] | None = None, *, windows: Collection[tuple[str, str]] | None = None
    ) -> list[WindowReport]:
        """See :func:`verify`."""
        with self._connected() as reader:
            return [self._check(reader, *window) for window in self._windows(reader, budgets, windows)]

    def repair(
        self, budgets: Sequence[Budget] | None = None, *, windows: Collection[tuple[str, str]] | None = None
    ) -> Repair:
        """Rebuild the indexes of holds from the holds' records, and the windows' counters from ledgers and open holds.

        Writers need not stop. Each correction is logged. The correction of a counter also adds a ledger entry of kind
        ``audit`` with the amount 0.

        Raises:
            StoreUnavailable: the store does not reply; earlier corrections remain.
        """
        with self._connected() as reader:
            repair = Repair([])
            for change, hold_id in reader.reindex():
                repair.index_changes.append(IndexChange(change[1:], hold_id, change[0] == "+"))
            _log_index_changes(repair.index_changes)
            for window in self._windows(reader, budgets, windows):
                repair.windows.append(self._repair(reader, *window, repair.changes))
            return repair

    # -- internals -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _connected(self) -> Iterator[AuditReader]:
        from redis import exceptions as redis

        shown = mask_url(self._url)
        moved = redis.AskError, redis.TryAgainError, redis.ClusterDownError, redis.MasterDownError, redis.ReadOnlyError
        try:
            if self._reader is None:
                self._client = connect(self._url, self._keys.meta, self._timeout, self._credentials)
                self._reader = AuditReader(self._client, self._keys)
            yield self._reader
        except ValueError:
            raise StoreError(f"store at {shown}: {_FOREIGN_DATA}") from None
        except (redis.AuthenticationError, redis.AuthorizationError) as error:
            raise StoreError(f"store at {shown}: {error}", fault="login") from None
        except (redis.ConnectionError, redis.TimeoutError, OSError, *moved) as error:
            self.close()  # the next check must find the primary again
            where = parse_url(self._url)
            wrong = check_protocol(where.hosts[0], where.tls) if where.hosts else None
            failure = translate(wrong or error, shown)
            raise (failure if isinstance(failure, StoreError) else StoreUnavailable(str(failure))) from None
        except redis.RedisError as error:
            raise StoreError(f"store at {shown}: {error}") from None

    @staticmethod
    def _windows(
        reader: AuditReader, budgets: Sequence[Budget] | None, windows: Collection[tuple[str, str]] | None
    ) -> list[tuple[str, str]]:
        reader.check_epoch()
        if windows is not None and all("~" in window for _, window in windows):
            found = sorted(windows)
        else:
            found = [
                (budget, window)
                for budget, window in reader.windows()
                if windows is None or (budget, window) in windows or (budget, public_window(window)) in windows
            ]
        reader.keep_ledgers_of(found)
        names = None if budgets is None else {budget.name for budget in budgets}
        return [window for window in found if names is None or window[0] in names]

    def _check(self, reader: AuditReader, budget: str, window: str) -> WindowReport:
        attempts = 0
        while True:
            report = self._report(_snapshot(reader, budget, window), budget, window)
            attempts += 1
            if attempts == _ATTEMPTS or (report.conclusive and report.adds_up):
                return report

    def _report(self, snapshot: WindowSnapshot | str, budget: str, window: str) -> WindowReport:
        if isinstance(snapshot, str):
            key, unknown = self._keys.window(budget, window), (0, 0, 0, 0, 0)
            return WindowReport(key, budget, public_window(window), "count", *unknown, conclusive=False, fault=snapshot)
        ledger = snapshot.ledger
        return WindowReport(
            window_key=self._keys.window(budget, window),
            budget=budget,
            window=public_window(window),
            unit=snapshot.unit,
            spent=snapshot.spent,
            held=snapshot.held,
            unconfirmed=snapshot.unconfirmed,
            ledger_sum=0 if ledger is None else ledger.total,
            holds_sum=snapshot.holds_sum or 0,
            conclusive=ledger is not None and snapshot.holds_sum is not None,
            unconfirmed_sum=None if ledger is None or ledger.carried else ledger.unconfirmed,
        )

    def _repair(self, reader: AuditReader, budget: str, window: str, changes: list[Change]) -> WindowReport:
        for _ in range(_REPAIR_ATTEMPTS):
            snapshot = _snapshot(reader, budget, window)
            if isinstance(snapshot, str):
                break
            if snapshot.ledger is None:
                continue
            differences, missing = _differences(snapshot, snapshot.ledger)
            if not differences and not missing and not snapshot.vanished:
                if snapshot.holds_sum is not None:
                    return self._report(snapshot, budget, window)
                continue
            if snapshot.holds_sum is None and set(differences) <= {"events"} and not missing:
                continue  # read again, so that all counters are corrected at once
            note = _note(differences, missing)
            corrected = reader.correct(budget, window, snapshot, differences, missing, note)
            if corrected is None:
                continue  # another repair has corrected the window since the snapshot
            name = public_window(window)
            for counter, (before, after) in corrected.items():
                changes.append(Change(budget, name, snapshot.unit, counter, before, after))
            if missing:
                total = snapshot.ledger.total
                changes.append(Change(budget, name, snapshot.unit, "ledger", total, total + missing))
            text = _correction_text(corrected, missing)
            logger.warning("repaired window %s: %s", self._keys.window(budget, window), text)
        return self._check(reader, budget, window)


def _log_index_changes(changes: Sequence[IndexChange]) -> None:
    for index, added in sorted({(change.index, change.added) for change in changes}):
        ids = [change.hold_id for change in changes if (change.index, change.added) == (index, added)]
        shown = ", ".join(ids[:_IDS_LOGGED]) + (", …" if len(ids) > _IDS_LOGGED else "")
        logger.warning("repaired index %r: %d holds %s: %s", index, len(ids), "added" if added else "removed", shown)


def _snapshot(reader: AuditReader, budget: str, window: str) -> WindowSnapshot | str:
    """Read a window. If that fails, return the reason, so that the check of the other windows continues."""
    from redis import ResponseError

    try:
        return reader.snapshot(budget, window)
    except ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        return without_secrets(error)
    except ValueError:
        return _FOREIGN_DATA


def _differences(snapshot: WindowSnapshot, ledger: Ledger) -> tuple[dict[str, int], int]:
    """Compute the correction of each wrong counter, and the amount that the ledger lacks.

    The ledger counts as damaged if two other sources agree on a higher spend: the counter ``spent``, and the sum of the
    replicas' subtotals. In that case ``spent`` and ``unconfirmed`` are not corrected, and the ledger gets an entry of
    the amount that it lacks.
    """
    differences: dict[str, int] = {}
    missing = 0
    total = ledger.total
    charged = snapshot.spent + snapshot.unconfirmed
    agreed = snapshot.spent == snapshot.replica_subtotals
    if charged > total and agreed and snapshot.spent > total - ledger.unconfirmed:
        missing = charged - total
    elif not ledger.carried:
        differences["spent"] = total - ledger.unconfirmed - snapshot.spent
        differences["unconfirmed"] = ledger.unconfirmed - snapshot.unconfirmed
        differences["events"] = ledger.events - snapshot.events
    elif charged != total:
        # It is unknown which of the carried-forward entries are unconfirmed; the replicas' subtotals decide.
        spent = min(snapshot.replica_subtotals, total)
        differences["spent"] = spent - snapshot.spent
        differences["unconfirmed"] = total - spent - snapshot.unconfirmed
    if snapshot.holds_sum is not None:
        differences["held"] = snapshot.holds_sum - snapshot.held
    return {counter: units for counter, units in differences.items() if units}, missing


def _note(differences: dict[str, int], missing: int) -> str:
    """The label of a correction's ledger entry."""
    parts = [f"{counter} {units:+d}" for counter, units in differences.items()]
    return word(", ".join([*parts, *([f"ledger {missing:+d}"] if missing else [])]))


def _correction_text(corrected: dict[str, tuple[int, int]], missing: int) -> str:
    parts = [f"{counter} from {before} to {after}" for counter, (before, after) in corrected.items()]
    return ", ".join([*parts, *([f"ledger by {missing:+d}"] if missing else [])])
