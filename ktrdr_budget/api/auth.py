"""Authentication by bearer keys: *use* keys and *admin* keys.

==================  =============================================================================================
keys that are set   access
==================  =============================================================================================
none                callers on this machine: everything; other callers: nothing, or everything if ``open_to_all``
use                 the use key: everything except admin operations, which are refused
admin               the admin key: everything
both                the use key: everything except admin operations; the admin key: everything
==================  =============================================================================================
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.requests import HTTPConnection

from ktrdr_budget.api.problems import HTTPProblem
from ktrdr_budget.environment import check_names

__all__ = ["BearerKey", "Caller", "Keys", "is_loopback"]


class Caller(NamedTuple):
    """The authenticated sender of a request."""

    owner: str
    """The caller's name. The record of a hold has the name of the caller that reserved the hold."""
    admin: bool


class Keys:
    """The keys of a service.

    Args:
        use: keys that may use budgets.
        admin: keys that may do everything.
        open_to_all: if there are no keys, serve callers on all machines. Default: only callers on this machine.
    """

    def __init__(self, use: Iterable[str] = (), admin: Iterable[str] = (), *, open_to_all: bool = False) -> None:
        self._callers = [(key.encode(), Caller(_owner(key), False)) for key in use]
        self._callers += [(key.encode(), Caller(_owner(key), True)) for key in admin]
        self._open_to_all = open_to_all

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys:
        """Read ``KTRDR_API_KEY`` and ``KTRDR_ADMIN_KEY`` (commas separate several keys), and ``KTRDR_AUTH=none``."""
        check_names(environment)
        use, admin = (
            [key for key in map(str.strip, environment.get(name, "").split(",")) if key]
            for name in ("KTRDR_API_KEY", "KTRDR_ADMIN_KEY")
        )
        return cls(use, admin, open_to_all=environment.get("KTRDR_AUTH", "").strip() == "none")

    def __repr__(self) -> str:
        return f"<Keys: {len(self._callers)}>"

    def __bool__(self) -> bool:
        """Whether requests need a key."""
        return bool(self._callers)

    def authenticate(self, connection: HTTPConnection) -> Caller:
        """Identify the caller of a request.

        Raises:
            HTTPProblem: 401 if the key is missing or unknown; 403 if there are no keys and the caller is on another
                machine.
        """
        if not self._callers:
            if self._open_to_all or _is_local(connection.scope.get("client")):
                return _ANONYMOUS
            raise HTTPProblem(
                403,
                "keys-required",
                "this service has no keys, so it serves its own machine only; set KTRDR_API_KEY and KTRDR_ADMIN_KEY",
            )
        scheme, _, key = connection.headers.get("authorization", "").encode("latin-1").partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else b""
        found = None
        for known, caller in self._callers:  # compare with all keys, so that the time does not show which key matches
            if hmac.compare_digest(known, key):
                found = caller
        if found is None:
            detail = "the key is not known" if key else "a key is needed: Authorization: Bearer <key>"
            raise HTTPProblem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})
        return found

    def authenticate_admin(self, connection: HTTPConnection) -> Caller:
        """Identify the caller of an admin operation.

        Raises:
            HTTPProblem: as for :meth:`authenticate`; 403 if the caller has no admin key.
        """
        caller = self.authenticate(connection)
        if not caller.admin:
            raise HTTPProblem(403, "forbidden", "this operation needs the admin key")
        return caller


class BearerKey(SecurityBase):
    """A dependency that returns the caller, and documents in OpenAPI that a key is needed."""

    def __init__(self, scheme_name: str, setting: str, authenticate: Callable[[Request], Awaitable[Caller]]) -> None:
        self.scheme_name = scheme_name
        self.model = HTTPBearer(description=f"A key of {setting}.")
        self._authenticate = authenticate

    async def __call__(self, request: Request) -> Caller:
        """Authenticate the caller."""
        return await self._authenticate(request)


_ANONYMOUS = Caller("http", True)


def _owner(key: str) -> str:
    """Return the name of the caller with this key: a short hash, which does not reveal the key."""
    return f"http-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _is_local(client: Any) -> bool:
    """Whether a peer is on this machine. A peer without an address (a unix socket, a test client) counts as local."""
    return client is None or is_loopback(str(client[0]))


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether an address is a loopback address.

    If the text is no address, the result is true, because the request did not arrive over a network.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
