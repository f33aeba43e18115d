"""Reads a tenant's windows, ledgers, holds and indexes of holds on the live store, and corrects them.

The reader is synchronous, because an audit runs in a thread or in a command. It uses redis-py's plain client, and
:func:`connect` finds the one server that has the tenant's keys. Two other classes of redis-py are not used:
``RedisCluster`` scans every node and needs the permission for ``COMMAND``, and ``Sentinel`` reports a refused login as
an absent master.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from ktrdr_budget.engine.protocol.hold_record import parse_record
from ktrdr_budget.engine.protocol.keys import Keys, split_name
from ktrdr_budget.engine.protocol.ledger import parse_entry
from ktrdr_budget.engine.protocol.scripts import CORRECT, REINDEX, script
from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.discovery import node_address, primary_of_slot
from ktrdr_budget.engine.transport.urls import Address, StoreUrl, parse_url
from ktrdr_budget.errors import StoreUnavailable

__all__ = ["AuditReader", "WindowSnapshot", "connect"]

_PAGE = 1000
_REINDEXED_AT_ONCE = 100
_EVENTS = frozenset({"commit", "record", "expiry", "correction", "repair"})
"""Kinds of entries that the counter ``events`` counts."""
_RESOLVING = frozenset({"correction", "release", "revival"})
"""Kinds of entries that take back the charge of an expiry."""


def connect(url: str, key: str, timeout: float, credentials: Credentials | None = None) -> Any:
    """Connect a synchronous client to the server that is now the primary of a key.

    The URL names a single server, a cluster, or Sentinel servers.

    Raises:
        InvalidArgument: the URL is not usable.
        StoreUnavailable: no cluster node or sentinel names that server.
        redis.RedisError: no cluster node or sentinel could be queried.
    """
    import redis

    where = parse_url(url)
    options: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    login = {} if credentials is None else {"credential_provider": credentials}
    if where.kind == "server":
        return redis.Redis.from_url(url, **options, **login)
    last_error: Exception | None = None
    for source in where.hosts:
        try:
            if where.kind == "cluster":
                with redis.Redis.from_url(where.at(source), **options, **login) as client:
                    primary = _primary_by_cluster(client, key, source)
            else:
                with redis.Redis.from_url(where.sentinel_at(source), **options) as client:
                    primary = _primary_by_sentinel(client, where, source)
        except (redis.RedisError, OSError) as error:
            last_error = error
        else:
            if primary is not None:
                return redis.Redis.from_url(where.at(primary), **options, **login)
    if last_error is not None:
        raise last_error
    raise StoreUnavailable(f"store at {where.shown}: no node or sentinel names the primary server")


def _primary_by_cluster(client: Any, key: str, source: Address) -> Address | None:
    from redis.crc import key_slot

    # redis-py's own method for CLUSTER SLOTS is not used, because it parses the reply into another form.
    ranges = client.execute_command("CLUSTER", "SLOTS")
    return primary_of_slot(key_slot(key.encode()), ranges, source)[0]


def _primary_by_sentinel(client: Any, where: StoreUrl, source: Address) -> Address | None:
    named = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", where.service)
    return node_address(named, source) if named else None


@dataclass(frozen=True, slots=True)
class WindowSnapshot:
    """One window at one instant."""

    spent: int
    held: int
    unconfirmed: int
    events: int
    replica_subtotals: int
    """The sum of all replicas' subtotals of ``spent``, as a second source for ``spent``."""
    corrections: int
    vanished: bool
    """Whether the window's key is missing although its ledger is there."""
    unit: str
    ledger: Ledger | None
    """The ledger at that instant; ``None`` if it was trimmed since then."""
    holds_sum: int | None
    """The sum of the open holds at that instant; ``None`` if a hold has changed since then."""


@dataclass(slots=True)
class Ledger:
    """The sums of a ledger up to one entry. A later snapshot adds the newer entries only.

    To trim a ledger is to replace its oldest entries by one summary. The sums stay valid if the ledger is trimmed,
    because the summary replaces entries that were already read.
    """

    number: int = 0
    """The number of the last entry read."""
    last: bytes = b""
    """The text of the last entry read."""
    head: bytes = b""
    """The first element of the list: entry 1, or the summary of trimmed entries."""
    trimmed_count: int = 0
    """The number of trimmed entries that ``head`` summarises; 0 if it is no summary."""
    total: int = 0
    events: int = 0
    """The number of entries that count as events."""
    carried: bool = False
    """Whether a summary was read. If so, the sums lack the events and unconfirmed charges of the entries in the
    summary."""
    charges: dict[str, int] = field(default_factory=dict)
    """Charges of expired holds that are still unconfirmed, by hold id."""

    @property
    def unconfirmed(self) -> int:
        """The sum of the unconfirmed charges."""
        return sum(self.charges.values())

    def add(self, text: bytes) -> None:
        """Add the next entry."""
        entry = parse_entry(text)
        self.last = text
        self.number += entry.trimmed_count or 1
        self.total += entry.units
        self.events += entry.kind in _EVENTS
        if entry.kind == "expiry":
            self.charges[entry.hold_id] = self.charges.get(entry.hold_id, 0) + entry.units
        elif entry.kind in _RESOLVING:
            self.charges.pop(entry.hold_id, None)
        elif entry.kind == "carried":
            self.carried = True

    def continues_at(self, head: bytes, trimmed_count: int, newest: int) -> bool:
        """Whether a stored ledger continues the ledger that was read before; if so, remember its first element.

        Args:
            head: the first element of the stored ledger.
            trimmed_count: how many entries that element summarises; 0 if it is no summary.
            newest: the number of the stored ledger's newest entry.
        """
        same_head = self.head == head if self.trimmed_count == trimmed_count else self.trimmed_count < trimmed_count
        if not (self.number == 0 or (same_head and trimmed_count <= self.number)) or self.number > newest:
            return False
        self.head, self.trimmed_count = head, trimmed_count
        if trimmed_count and self.number == trimmed_count:
            self.last = head
        return True


class AuditReader:
    """Reads a tenant's windows and holds, and corrects them on request.

    Args:
        client: a client of redis-py that returns bytes.
    """

    def __init__(self, client: Any, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._ledgers: dict[str, Ledger] = {}
        self._epoch: bytes | None = None

    # -- windows -------------------------------------------------------------------------------------------------------

    def windows(self) -> list[tuple[str, str]]:
        """Return the budget and the stored name of each window that has counters or a ledger in the store."""
        found = set()
        for prefix in (self._keys.window("", "")[:-1], self._keys.ledger("", "")[:-1]):
            for key in self._scan(prefix):
                found.add(split_name(key.decode().removeprefix(prefix)))
        return sorted(found)

    def keep_ledgers_of(self, windows: Collection[tuple[str, str]]) -> None:
        """Keep the sums of the ledgers of these windows, and drop the sums of all others."""
        kept = {self._keys.ledger(*window) for window in windows}
        self._ledgers = {key: ledger for key, ledger in self._ledgers.items() if key in kept}

    def snapshot(self, budget: str, window: str) -> WindowSnapshot:
        """Read one window: the counters in one step, then the ledger entries and hold records page by page.

        Raises:
            StoreUnavailable: see :meth:`check_epoch`.
        """
        key, ledger_key = self._keys.window(budget, window), self._keys.ledger(budget, window)
        now_us, fields, head, last, length, open_ids = self._read_at_once(key, ledger_key)
        stored = {name.decode(): value.decode() for name, value in fields.items()}
        return WindowSnapshot(
            spent=int(stored.get("spent", 0)),
            held=int(stored.get("held", 0)),
            unconfirmed=int(stored.get("unconfirmed", 0)),
            events=int(stored.get("events", 0)),
            replica_subtotals=sum(int(value) for name, value in stored.items() if name.startswith("r:")),
            corrections=int(stored.get("corrections", 0)),
            vanished=not stored and length > 0,
            unit=stored.get("def", "usd").split(",")[0],
            holds_sum=self._holds_sum(open_ids, f"{budget}:{window}", now_us),
            ledger=self._ledger(ledger_key, head, last, length),
        )

    def _read_at_once(
        self, key: str, ledger_key: str
    ) -> tuple[int, dict[bytes, bytes], bytes, bytes, int, Sequence[bytes]]:
        """Read in one step: time, window, first and last ledger entry, length of the ledger, ids of the open holds.

        The step is a transaction. If there are many ids, a script would block the store for four times as long.
        """
        pipeline = self._client.pipeline(transaction=True)
        pipeline.time()
        pipeline.hgetall(key)
        pipeline.lindex(ledger_key, 0)
        pipeline.lindex(ledger_key, -1)
        pipeline.llen(ledger_key)
        pipeline.zrange(self._keys.due, 0, -1)
        pipeline.hget(self._keys.meta, "epoch")
        (seconds, microseconds), fields, head, last, length, open_ids, epoch = pipeline.execute()
        self._compare_epoch(epoch)
        return seconds * 1_000_000 + microseconds, fields, head or b"", last or b"", length, open_ids

    def check_epoch(self) -> None:
        """Drop the sums of all ledgers if the store's epoch has changed, which means that the store has lost data.

        Raises:
            StoreUnavailable: the store has lost all data since an earlier check, and no replica has repaired it yet.
        """
        self._compare_epoch(self._client.hget(self._keys.meta, "epoch"))

    def _compare_epoch(self, epoch: bytes | None) -> None:
        if epoch is None and self._epoch is not None:
            raise StoreUnavailable("data loss detected: the replicas have not replayed their journals yet")
        if epoch != self._epoch:
            self._epoch, self._ledgers = epoch, {}

    def _ledger(self, key: str, head: bytes, last: bytes, length: int) -> Ledger | None:
        """Return a ledger's sums up to the entry ``last``; ``None`` if the ledger was trimmed meanwhile.

        Only entries that are new since the last snapshot are read. If entries were removed other than by trimming, the
        whole ledger is read again.
        """
        trimmed_count = parse_entry(head).trimmed_count if head else 0
        newest = length - 1 + trimmed_count if trimmed_count else length
        known = self._ledgers.pop(key, None)
        for ledger in (known, Ledger()):
            if ledger is None or not ledger.continues_at(head, trimmed_count, newest):
                continue
            if self._read_on(ledger, key, newest) and ledger.last == last:
                self._ledgers[key] = ledger
                return ledger
        return None

    def _read_on(self, ledger: Ledger, key: str, newest: int) -> bool:
        """Read the entries up to number ``newest``, page by page; return false if the ledger was trimmed meanwhile."""
        first = ledger.trimmed_count or 1  # the number at index 0
        while ledger.number < newest:
            known = 1 if ledger.number else 0  # a page begins with the last entry read, which shows that nothing moved
            start = ledger.number - first if known else 0
            pipeline = self._client.pipeline(transaction=True)
            pipeline.lindex(key, 0)
            pipeline.lrange(key, start, min(start + known + _PAGE - 1, newest - first))
            head, page = pipeline.execute()
            if head != ledger.head or len(page) <= known or (known and page[0] != ledger.last):
                return False
            for text in page[known:]:
                ledger.add(text)
        return ledger.number == newest

    def _holds_sum(self, ids: Sequence[bytes], name: str, now_us: int) -> int | None:
        """Return the sum, in one window, of the holds that were open at ``now_us``.

        Return ``None`` if one of these holds has changed since then.
        """
        total = 0
        for page in _pages(ids, _PAGE):
            for stored in self._client.mget([self._keys.hold(hold_id.decode()) for hold_id in page]):
                if stored is None:
                    continue
                record = parse_record(stored.decode())
                if record.grown_us > now_us or record.created_us > now_us:
                    return None
                for segment in record.segments:
                    if segment.name == name:
                        total += max(segment.reserved, 0 if segment.flag == "s" else segment.accrued)
        return total

    def correct(
        self, budget: str, window: str, snapshot: WindowSnapshot, differences: dict[str, int], missing: int, note: str
    ) -> dict[str, tuple[int, int]] | None:
        """Add the differences to the counters; return each counter's value before and after.

        If another repair has corrected the window since the snapshot, change nothing and return ``None``.

        Args:
            snapshot: the snapshot that the differences were found in.
            missing: the amount that the ledger lacks; the ledger gets an entry of that amount.
            note: the label of the correction's ledger entry, without a space.
        """
        keys = [self._keys.window(budget, window), self._keys.ledger(budget, window), self._keys.budgets]
        pairs = [word for name, units in differences.items() for word in (name, str(units))]
        reply = self._evaluate(CORRECT, keys, [str(snapshot.corrections), note, str(missing), budget, *pairs])
        if not reply:
            return None
        figures = list(map(int, reply[1:]))
        return dict(zip(differences, zip(figures[::2], figures[1::2], strict=True), strict=True))

    # -- indexes -------------------------------------------------------------------------------------------------------

    def reindex(self) -> list[tuple[str, str]]:
        """Rebuild the indexes of holds from their records; return each change, such as ``+due``, with the hold's id."""
        prefix = self._keys.hold_prefix
        ids = (key.decode().removeprefix(prefix) for key in self._scan(prefix))
        changes = list(self._reindex(ids, self._unindexed))
        for state, key in self._indexes():
            members = (member.decode() for member, _ in self._client.zscan_iter(key, count=_PAGE))
            changes += self._reindex(members, partial(self._stray, state))
        return changes

    def _indexes(self) -> tuple[tuple[bytes, str], ...]:
        """For each index, return the state of the holds in the index, and the key of the index."""
        return (b"o", self._keys.due), (b"x", self._keys.unconfirmed)

    def _reindex(self, ids: Iterable[str], wrong: Callable[[list[str]], list[str]]) -> Iterator[tuple[str, str]]:
        """Find the wrong ids page by page. A script checks these ids again, and corrects the indexes in one step."""
        for page in _pages(ids, _PAGE):
            for part in _pages(wrong(page), _REINDEXED_AT_ONCE):
                keys = [self._keys.due, self._keys.unconfirmed, *map(self._keys.hold, part)]
                words = [word.decode() for word in self._evaluate(REINDEX, keys, part)]
                yield from zip(words[::2], words[1::2], strict=True)

    def _unindexed(self, ids: list[str]) -> list[str]:
        """Return the holds that are missing from their index, or whose deadline in the index is wrong."""
        found = self._client.mget([self._keys.hold(hold_id) for hold_id in ids])
        records = dict(zip(ids, found, strict=True))
        wrong: list[str] = []
        for state, key in self._indexes():
            wanted = [hold_id for hold_id, record in records.items() if record and record[:1] == state]
            scores = self._client.zmscore(key, wanted) if wanted else []
            for hold_id, score in zip(wanted, scores, strict=True):
                if score is None or (state == b"o" and score != int(records[hold_id].split(b" ", 3)[2])):
                    wrong.append(hold_id)
        return wrong

    def _stray(self, state: bytes, ids: list[str]) -> list[str]:
        """The ids in an index whose hold has no record, or is in another state."""
        found = self._client.mget([self._keys.hold(hold_id) for hold_id in ids])
        return [hold_id for hold_id, record in zip(ids, found, strict=True) if not record or record[:1] != state]

    # -- the store -----------------------------------------------------------------------------------------------------

    def _evaluate(self, name: str, keys: Sequence[str], args: Sequence[str]) -> Any:
        return self._client.eval(script(name).source, len(keys), *keys, *args)

    def _scan(self, prefix: str) -> Iterator[bytes]:
        pattern = "".join(f"[{letter}]" if letter in "*?[]" else letter for letter in prefix) + "*"
        yield from self._client.scan_iter(match=pattern, count=_PAGE)


def _pages(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(items)
    while page := list(islice(remaining, size)):
        yield page
