"""Who may do what: bearer keys for *use* and for *admin*.

==================  ======================================================================================
keys that are set   who may
==================  ======================================================================================
none                everybody on this machine may do everything; others nothing (unless ``open_to_all``)
use                 the use key all but what is for admins; nobody that
admin               the admin key everything; nobody else anything
both                the use key all but what is for admins; the admin key everything
==================  ======================================================================================
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ktrdr_budget.api.problems import Problem
from ktrdr_budget.environment import check_names

__all__ = ["Caller", "Keys", "is_loopback"]


class Caller(NamedTuple):
    """Who asks."""

    owner: str
    """Marks the holds that this caller reserves."""
    admin: bool


class Keys:
    """The keys of a service.

    Args:
        use: keys that may use budgets.
        admin: keys that may do everything.
        open_to_all: without any key, serve callers from other machines, too.
    """

    def __init__(self, use: Iterable[str] = (), admin: Iterable[str] = (), *, open_to_all: bool = False) -> None:
        self._known = [(key.encode(), Caller(_owner(key), False)) for key in use]
        self._known += [(key.encode(), Caller(_owner(key), True)) for key in admin]
        self._open_to_all = open_to_all

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys:
        """``KTRDR_API_KEY`` and ``KTRDR_ADMIN_KEY`` (several keys are separated by commas), and ``KTRDR_AUTH=none``."""
        check_names(environment)
        use, admin = (
            [key for key in map(str.strip, environment.get(name, "").split(",")) if key]
            for name in ("KTRDR_API_KEY", "KTRDR_ADMIN_KEY")
        )
        return cls(use, admin, open_to_all=environment.get("KTRDR_AUTH", "").strip() == "none")

    def __repr__(self) -> str:
        return f"<Keys: {len(self._known)}>"

    def __bool__(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._known)

    def caller(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> Caller:
        """Who asks.

        Raises:
            Problem: 401 without a key, or with one that is not known; 403 from another machine, if there are no keys.
        """
        if not self._known:
            if self._open_to_all or _is_local(scope.get("client")):
                return _ANYBODY
            raise Problem(
                403,
                "keys-required",
                "this service has no keys, so it serves its own machine only; set KTRDR_API_KEY and KTRDR_ADMIN_KEY",
            )
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else b""
        found = None
        for known, caller in self._known:  # all of them, so that the time taken does not tell which one was near
            if hmac.compare_digest(known, key):
                found = caller
        if found is None:
            detail = "the key is not known" if key else "a key is needed: Authorization: Bearer <key>"
            raise Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})
        return found


_ANYBODY = Caller("http", True)


def _owner(key: str) -> str:
    """A name for the holder of a key that does not tell the key."""
    return f"http-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _is_local(client: Any) -> bool:
    """Whether a peer is on this machine; a peer without an address (a unix socket, a test client) is."""
    return client is None or is_loopback(str(client[0]))


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; what is no address was not reached over a network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
