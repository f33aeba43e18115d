"""Access keys: secrets by which the service knows its clients, created and revoked at run time.

The store keeps the SHA-256 digest of a secret, so nothing in the store can be used as a key. A secret has 256 random
bits, so its digest needs no salt.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast, get_args

from ktrdr_budget.definitions import SCOPE_FIELDS_MAX, check_scope
from ktrdr_budget.engine.calls.context import checked_label
from ktrdr_budget.engine.calls.results import page_size
from ktrdr_budget.engine.protocol import access_keys as protocol
from ktrdr_budget.engine.protocol.requests import Command
from ktrdr_budget.errors import InvalidArgument, KeyConflict, UnknownKey, shown
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.models import AccessKey, Page, Rights, check_field, check_name

__all__ = ["KEYS_MAX", "AccessKeys", "NewKey", "is_secret"]

KEYS_MAX = 10_000
"""The maximum number of access keys of a tenant."""
_SECRET = re.compile(r"ktrdr_[A-Za-z0-9_-]{43}", re.ASCII)
_LIFETIME = re.compile(r"(\d{1,6})([mhd])", re.ASCII)
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_LIFETIME_MIN, _LIFETIME_MAX = timedelta(seconds=1), timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just created, and its secret, which nothing can show again."""

    key: AccessKey
    secret: str = field(repr=False)


def is_secret(text: str) -> bool:
    """Whether a text has the form of a secret, so that it may be one."""
    return _SECRET.fullmatch(text) is not None


class AccessKeys:
    """The access keys of a limiter's tenant. Every method may raise ``StoreUnavailable``."""

    def __init__(self, limiter: AsyncBudgetLimiter) -> None:
        self._limiter = limiter

    async def create(
        self,
        name: str,
        *,
        scope: Mapping[str, str] | None = None,
        may_set: Iterable[str] = (),
        rights: Rights = "use",
        expires: timedelta | str | None = None,
        by: str = "",
        reason: str = "",
    ) -> NewKey:
        """Create a key.

        Args:
            name: a name that no other key has.
            scope: the scope of all requests with this key.
            may_set: the further fields of a scope that requests with this key may set.
            rights: ``read``: read; ``use``: also reserve, settle and record; ``admin``: everything.
            expires: how long the key is valid: ``"90d"``, ``"12h"``, ``"30m"``, … ``None``: until it is revoked.
            by: who creates the key, for the log of changes.
            reason: why, for the same log.

        Raises:
            InvalidArgument: an argument is invalid.
            KeyConflict: another key has this name, or the tenant has 10,000 keys.
        """
        key = AccessKey(
            name=check_name(name, "the name of a key"),
            scope=check_scope({} if scope is None else scope),
            may_set=_check_may_set(may_set),
            rights=_check_rights(rights),
            created_at=datetime.now(UTC),
            expires_at=None,
        )
        if both := set(key.scope).intersection(key.may_set):
            raise InvalidArgument(f"the scope of the key fixes {', '.join(sorted(both))}, so it cannot set it")
        secret = f"ktrdr_{secrets.token_urlsafe(32)}"
        lifetime_ms, by, reason = _lifetime_ms(expires), checked_label(by), checked_label(reason)
        digest = protocol.digest_of(secret)
        command = protocol.create_key(self._limiter.keys, key, digest, lifetime_ms, KEYS_MAX, by, reason)
        reply = _text(await self._execute(command))
        if reply == "taken":
            raise KeyConflict(f"a key named {name!r} exists: revoke it first, or use another name")
        if reply == "full":
            raise KeyConflict(f"the tenant has {KEYS_MAX} keys, the most that it may have")
        return NewKey(protocol.parse_key(reply), secret)

    async def find(self, secret: str) -> AccessKey | None:
        """Read the key with this secret; ``None`` if there is none, or if the key was revoked or has expired."""
        record = await self._execute(protocol.find_key(self._limiter.keys, protocol.digest_of(secret)))
        return protocol.parse_key(_text(record)) if record else None

    async def list(self, limit: int = 100, cursor: str | None = None) -> Page[AccessKey]:
        """Read the keys in the order of their names.

        Args:
            limit: keys per page, 1 to 1000.
            cursor: ``next_cursor`` of the previous page; ``None`` for the first page.
        """
        page_size(limit)
        keys, after = self._limiter.keys, "" if cursor is None else check_name(cursor, "a cursor")
        members = [_text(member) for member in await self._execute(protocol.list_names(keys, after, limit + 1))]
        page = members[:limit]
        records = await self._execute(protocol.read_keys(keys, page)) if page else []
        found = tuple(protocol.parse_key(_text(record)) for record in records if record)
        return Page(found, protocol.name_of(page[-1]) if len(members) > limit else None)

    async def revoke(self, name: str, *, by: str = "", reason: str = "") -> None:
        """Revoke a key: the next request with it is refused. Its holds stay open.

        Args:
            by: who revokes the key, for the log of changes.
            reason: why, for the same log.

        Raises:
            UnknownKey: no key has this name.
        """
        keys, by, reason = self._limiter.keys, checked_label(by), checked_label(reason)
        members = await self._execute(protocol.member_of(keys, check_name(name, "the name of a key")))
        if not members:
            raise UnknownKey(f"no key is named {name!r}")
        for member in members:
            await self._execute(protocol.revoke_key(keys, _text(member), by, reason))

    async def _execute(self, command: Command) -> Any:
        return await self._limiter.execute(command, "access key")


def _check_may_set(fields: Iterable[str]) -> tuple[str, ...]:
    if isinstance(fields, str) or not isinstance(fields, Iterable):
        raise InvalidArgument(f"may_set must be a list of fields, not {shown(fields)}")
    found = tuple(sorted({check_field(each) for each in fields}))
    if len(found) > SCOPE_FIELDS_MAX:
        raise InvalidArgument(f"a key may set at most {SCOPE_FIELDS_MAX} fields, not {len(found)}")
    return found


def _check_rights(rights: object) -> Rights:
    if rights in get_args(Rights):
        return cast(Rights, rights)
    raise InvalidArgument(f"rights must be 'read', 'use' or 'admin', not {shown(rights)}")


def _lifetime_ms(expires: object) -> int:
    """The milliseconds that a key is valid; 0 for a key that does not expire."""
    if expires is None:
        return 0
    lifetime = expires
    if isinstance(expires, str) and (match := _LIFETIME.fullmatch(expires)):
        lifetime = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if isinstance(lifetime, timedelta) and _LIFETIME_MIN <= lifetime <= _LIFETIME_MAX:
        return lifetime // timedelta(milliseconds=1)
    raise InvalidArgument(f"a key expires after at most 3650d, such as '90d', '12h' or '30m', not {shown(expires)}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
