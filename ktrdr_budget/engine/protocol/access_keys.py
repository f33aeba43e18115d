"""Access keys as the store keeps them, and the requests that create, read and revoke them.

The store has the SHA-256 digest of a key's secret, and never the secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

from ktrdr_budget.definitions import parse_scope, scope_text
from ktrdr_budget.engine.protocol.hold_record import word
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.engine.protocol.requests import Command
from ktrdr_budget.engine.protocol.scripts import CREATE_KEY, REVOKE_KEY
from ktrdr_budget.models import AccessKey
from ktrdr_budget.periods import from_ms

__all__ = [
    "create_key",
    "digest_of",
    "find_key",
    "list_names",
    "member_of",
    "name_of",
    "parse_key",
    "read_keys",
    "revoke_key",
]


def digest_of(secret: str) -> str:
    """The digest of a secret, which is a part of the name of the key's record."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_key(
    keys: Keys, key: AccessKey, digest: str, lifetime_ms: int, keys_max: int, by: str, reason: str
) -> Command:
    """Create a key. The reply is its record, ``taken`` or ``full``."""
    of = [keys.access_names, keys.access_ends, keys.access_key(digest), keys.changes]
    fields = [key.rights, scope_text(key.scope) or "-", ",".join(key.may_set) or "-"]
    member = f"{key.name} {digest}"
    return Command(CREATE_KEY, of, [member, *fields, lifetime_ms, keys_max, word(by), word(reason)])


def revoke_key(keys: Keys, member: str, by: str, reason: str) -> Command:
    """Revoke a key, which the index lists as this member. The reply is 0 if the key has expired or was revoked."""
    of = [keys.access_names, keys.access_ends, keys.access_key(_digest_in(member)), keys.changes]
    return Command(REVOKE_KEY, of, [member, word(by), word(reason)])


def find_key(keys: Keys, digest: str) -> Command:
    """Read the record of the key with this digest."""
    return Command(None, (), ("GET", keys.access_key(digest)))


def member_of(keys: Keys, name: str) -> Command:
    """Read the members of the index that have this name: at most two, as one may have expired."""
    return Command(None, (), ("ZRANGE", keys.access_names, f"[{name} ", f"({name}!", "BYLEX"))


def list_names(keys: Keys, after: str, count: int) -> Command:
    """Read members of the index in the order of their names.

    Args:
        after: the name that precedes the page; empty for the first page.
    """
    first = f"[{after}!" if after else "-"  # `!` follows the space after the name
    return Command(None, (), ("ZRANGE", keys.access_names, first, "+", "BYLEX", "LIMIT", 0, count))


def read_keys(keys: Keys, members: Sequence[str]) -> Command:
    """Read the records of members of the index; a key that has expired has none."""
    return Command(None, (), ("MGET", *(keys.access_key(_digest_in(member)) for member in members)))


def parse_key(record: str) -> AccessKey:
    """Parse the record of a key."""
    name, rights, created_ms, expires_ms, scope, may_set = record.split(" ")
    return AccessKey(
        name=name,
        scope=parse_scope("" if scope == "-" else scope),
        may_set=() if may_set == "-" else tuple(may_set.split(",")),
        rights=cast(Any, rights),
        created_at=from_ms(int(created_ms)),
        expires_at=from_ms(int(expires_ms)) if int(expires_ms) else None,
    )


def name_of(member: str) -> str:
    """The name in a member of the index."""
    return member.partition(" ")[0]


def _digest_in(member: str) -> str:
    return member.partition(" ")[2]
