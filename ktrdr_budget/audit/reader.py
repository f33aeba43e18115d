"""The books of one tenant, read on the live store: windows, their ledgers, their holds, and the indexes of these.

Synchronous, over a plain client of redis-py: a check is no part of any call, and its place is a thread or a command.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktrdr_budget.engine.protocol import parse_record
from ktrdr_budget.engine.protocol.keys import Keys, split_name
from ktrdr_budget.engine.protocol.scripts import CORRECT, REINDEX, script
from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.urls import Address, parse_url
from ktrdr_budget.errors import StoreUnavailable

__all__ = ["AuditReader", "WindowSnapshot", "connect"]

_PAGE = 1000
_REINDEXED_AT_ONCE = 100
_COUNTED = frozenset({"commit", "record", "expiry", "correction", "repair"})
"""Kinds of entries that the counter `events` counts."""
_RESOLVING = frozenset({"correction", "release", "revival"})
"""Kinds that take back what an expiry had charged."""


def connect(url: str, key: str, timeout: float, credentials: Credentials | None = None) -> Any:
    """A synchronous client of the server that has this key: of a cluster, or behind sentinels, of one that may change.

    Raises:
        InvalidArgument: the URL is not usable.
        StoreUnavailable: nobody names that server.
        redis.RedisError: nobody can be asked.
    """
    import redis

    where = parse_url(url)
    options: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    login = {} if credentials is None else {"credential_provider": credentials}
    if where.kind == "server":
        return redis.Redis.from_url(url, **options, **login)
    trouble: Exception | None = None
    for address in where.hosts:
        try:
            if where.kind == "cluster":
                with redis.Redis.from_url(where.at(address), **options, **login) as node:
                    home = _owner(node.execute_command("CLUSTER", "SLOTS"), key, address)
            else:
                with redis.Redis.from_url(where.sentinel_at(address), **options) as sentinel:
                    home = _place(
                        sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", where.service), address
                    )
        except (redis.RedisError, OSError) as error:
            trouble = error
        else:
            if home is not None:
                return redis.Redis.from_url(where.at(home), **options, **login)
    if trouble is not None:
        raise trouble
    raise StoreUnavailable(f"store at {where.shown}: nobody names the server that is to be asked")


def _owner(slots: Any, key: str, asked: Address) -> Address | None:
    """The master of a key's slot, by the answer to CLUSTER SLOTS."""
    from redis.crc import key_slot

    slot = key_slot(key.encode())
    return next((_place(master, asked) for first, last, master, *_ in slots if first <= slot <= last), None)


def _place(words: Any, asked: Address) -> Address | None:
    """Host and port; a node that knows no name of itself is where it was asked."""
    if not words:
        return None
    host, port = (word.decode() if isinstance(word, bytes) else word for word in words[:2])
    return str(host or asked[0]), int(port)


@dataclass(frozen=True, slots=True)
class WindowSnapshot:
    """One window at one instant."""

    spent: int
    held: int
    unconfirmed: int
    events: int
    shares: int
    """What the replicas say, each of its own, that they have spent: another source for ``spent``."""
    corrections: int
    vanished: bool
    """There is a ledger, and nothing of the window itself."""
    unit: str
    ledger: Ledger | None
    """What the ledger held at that instant; ``None`` if it was shortened meanwhile."""
    holds_sum: int | None
    """What the open holds counted at that instant; ``None`` if that cannot be told any more."""


@dataclass(slots=True)
class Ledger:
    """The sums of a ledger from its first entry to its last; goes on from there at the next look."""

    first: str
    last: str = "0-0"
    entries: int = 0
    total: int = 0
    counted: int = 0
    """Entries that are events."""
    carried: bool = False
    """Some stand for older ones that are gone: then which of these are events or unconfirmed is not known any more."""
    charges: dict[str, int] = field(default_factory=dict)
    """What expiry has charged and nobody has resolved, by hold."""

    @property
    def unconfirmed(self) -> int:
        """The sum of the charges."""
        return sum(self.charges.values())

    def take(self, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        """Adds one entry."""
        amount = int(fields[b"a"])
        kind, hold_id, *_ = fields[b"e"].decode().split(" ")
        self.last = entry_id.decode()
        self.entries += 1
        self.total += amount
        self.counted += kind in _COUNTED
        if kind == "expiry":
            self.charges[hold_id] = self.charges.get(hold_id, 0) + amount
        elif kind in _RESOLVING:
            self.charges.pop(hold_id, None)
        elif kind == "carried":
            self.carried = True


class AuditReader:
    """Reads the books of one tenant, and corrects them if asked to.

    Args:
        client: of redis-py; answers in bytes.
    """

    def __init__(self, client: Any, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._ledgers: dict[str, Ledger] = {}
        self._epoch: bytes | None = None

    # -- windows -------------------------------------------------------------------------------------------------------

    def windows(self) -> list[tuple[str, str]]:
        """Budget and window, as the store names it, of each window, or ledger, in the store."""
        found = set()
        for prefix in (self._keys.window("", "")[:-1], self._keys.ledger("", "")[:-1]):
            for key in self._scan(prefix):
                found.add(split_name(key.decode().removeprefix(prefix)))
        return sorted(found)

    def forget_other_windows(self, windows: Collection[tuple[str, str]]) -> None:
        """Keeps no sums of ledgers but these."""
        kept = {self._keys.ledger(*window) for window in windows}
        self._ledgers = {key: ledger for key, ledger in self._ledgers.items() if key in kept}

    def look(self, budget: str, window: str) -> WindowSnapshot:
        """One window now: the sums in one step, what they are checked against page by page after it.

        Raises:
            StoreUnavailable: as for :meth:`check_timeline`.
        """
        key, ledger_key = self._keys.window(budget, window), self._keys.ledger(budget, window)
        now_us, fields, first, last, entries, open_ids = self._snapshot(key, ledger_key)
        stored = {name.decode(): value.decode() for name, value in fields.items()}
        return WindowSnapshot(
            spent=int(stored.get("spent", 0)),
            held=int(stored.get("held", 0)),
            unconfirmed=int(stored.get("unconfirmed", 0)),
            events=int(stored.get("events", 0)),
            shares=sum(int(value) for name, value in stored.items() if name.startswith("r:")),
            corrections=int(stored.get("corrections", 0)),
            vanished=not stored and entries > 0,
            unit=stored.get("def", "usd").split(",")[0],
            holds_sum=self._holds_sum(open_ids, f"{budget}:{window}", now_us),
            ledger=self._ledger(ledger_key, first, last, entries),
        )

    def _snapshot(self, key: str, ledger_key: str) -> tuple[int, dict[bytes, bytes], str, str, int, Sequence[bytes]]:
        """What has to belong together, in one step: the time, the window, the ends of the ledger, ids of open holds.

        A transaction, not a script: in a script the ids would stop the store for four times as long.
        """
        pipeline = self._client.pipeline(transaction=True)
        pipeline.time()
        pipeline.hgetall(key)
        pipeline.xrange(ledger_key, count=1)
        pipeline.xrevrange(ledger_key, count=1)
        pipeline.xlen(ledger_key)
        pipeline.zrange(self._keys.due, 0, -1)
        pipeline.hget(self._keys.meta, "epoch")
        (seconds, microseconds), fields, oldest, newest, entries, open_ids, epoch = pipeline.execute()
        self._see_epoch(epoch)
        first, last = (found[0][0].decode() if found else "" for found in (oldest, newest))
        return seconds * 1_000_000 + microseconds, fields, first, last, entries, open_ids

    def check_timeline(self) -> None:
        """Forgets what is known of ledgers if the store's epoch has changed.

        Raises:
            StoreUnavailable: the store has lost everything since an earlier check, and no replica has noticed yet.
        """
        self._see_epoch(self._client.hget(self._keys.meta, "epoch"))

    def _see_epoch(self, epoch: bytes | None) -> None:
        if epoch is None and self._epoch is not None:
            raise StoreUnavailable("the store has lost its data, which its replicas have yet to replay")
        if epoch != self._epoch:
            self._epoch, self._ledgers = epoch, {}

    def _ledger(self, key: str, first: str, last: str, entries: int) -> Ledger | None:
        """Its sums up to ``last``. Entries never change, so only what is new is read, unless some have vanished."""
        known = self._ledgers.pop(key, None)
        for book in (known, Ledger(first)):
            if book is None or book.first != first:
                continue
            while last and book.last != last:
                page = self._client.xrange(key, min=f"({book.last}", max=last, count=_PAGE)
                for entry in page:
                    book.take(*entry)
                if not page:
                    break
            if book.entries == entries:
                self._ledgers[key] = book
                return book
        return None

    def _holds_sum(self, ids: Sequence[bytes], name: str, now_us: int) -> int | None:
        """What the holds that were open at ``now_us`` counted in this window then, if that can still be told."""
        total = 0
        for start in range(0, len(ids), _PAGE):
            page = [self._keys.hold(hold_id.decode()) for hold_id in ids[start : start + _PAGE]]
            for stored in self._client.mget(page):
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
        self, budget: str, window: str, look: WindowSnapshot, differences: dict[str, int], missing: int, note: str
    ) -> dict[str, tuple[int, int]] | None:
        """Corrects counters by what they were off by at a look; each before and after, ``None``: somebody else did.

        Args:
            missing: what the ledger lacks; it gets an entry of that amount.
            note: one word that stays in the ledger.
        """
        keys = [self._keys.window(budget, window), self._keys.ledger(budget, window), self._keys.budgets]
        pairs = [word for name, units in differences.items() for word in (name, str(units))]
        reply = self._evaluate(CORRECT, keys, [str(look.corrections), note, str(missing), budget, *pairs])
        if not reply:
            return None
        figures = list(map(int, reply[1:]))
        return dict(zip(differences, zip(figures[::2], figures[1::2], strict=True), strict=True))

    # -- indexes -------------------------------------------------------------------------------------------------------

    def reindex(self) -> list[tuple[str, str]]:
        """Lets the indexes of holds say what the records say; what was changed, each ``+due`` or the like and an id."""
        return [*self._reindex_records(), *self._reindex_entries()]

    def _reindex_records(self) -> Iterator[tuple[str, str]]:
        """Records that an index lacks."""
        prefix = self._keys.hold_prefix
        page: list[str] = []
        for key in self._scan(prefix):
            page.append(key.decode().removeprefix(prefix))
            if len(page) == _PAGE:
                yield from self._let(self._unindexed(page))
                page = []
        if page:
            yield from self._let(self._unindexed(page))

    def _unindexed(self, ids: list[str]) -> list[str]:
        found = self._client.mget([self._keys.hold(hold_id) for hold_id in ids])
        records = dict(zip(ids, found, strict=True))
        wrong: list[str] = []
        for state, key in ((b"o", self._keys.due), (b"x", self._keys.unconfirmed)):
            wanted = [hold_id for hold_id, record in records.items() if record and record[:1] == state]
            scores = self._client.zmscore(key, wanted) if wanted else []
            for hold_id, score in zip(wanted, scores, strict=True):
                if score is None or (state == b"o" and score != int(records[hold_id].split(b" ", 3)[2])):
                    wrong.append(hold_id)
        return wrong

    def _reindex_entries(self) -> Iterator[tuple[str, str]]:
        """Entries of an index whose record is gone, or says otherwise."""
        for state, key in ((b"o", self._keys.due), (b"x", self._keys.unconfirmed)):
            page: list[str] = []
            for member, _ in self._client.zscan_iter(key, count=_PAGE):
                page.append(member.decode())
                if len(page) >= _PAGE:
                    yield from self._let(self._stray(page, state))
                    page = []
            if page:
                yield from self._let(self._stray(page, state))

    def _stray(self, ids: list[str], state: bytes) -> list[str]:
        found = self._client.mget([self._keys.hold(hold_id) for hold_id in ids])
        return [hold_id for hold_id, record in zip(ids, found, strict=True) if not record or record[:1] != state]

    def _let(self, ids: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Looks at each again, and changes what is still wrong, in one step."""
        for start in range(0, len(ids), _REINDEXED_AT_ONCE):
            part = ids[start : start + _REINDEXED_AT_ONCE]
            keys = [self._keys.due, self._keys.unconfirmed, *map(self._keys.hold, part)]
            words = [word.decode() for word in self._evaluate(REINDEX, keys, part)]
            yield from zip(words[::2], words[1::2], strict=True)

    # -- the store -----------------------------------------------------------------------------------------------------

    def _evaluate(self, name: str, keys: Sequence[str], args: Sequence[str]) -> Any:
        return self._client.eval(script(name).source, len(keys), *keys, *args)

    def _scan(self, prefix: str) -> Iterator[bytes]:
        pattern = "".join(f"[{letter}]" if letter in "*?[]" else letter for letter in prefix) + "*"
        yield from self._client.scan_iter(match=pattern, count=_PAGE)
