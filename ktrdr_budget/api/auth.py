"""Authentication by bearer keys: those of the environment, and access keys, which the store has.

An access key is read from the store with every request, so that the next request obeys its revocation. Its rights are
``read``, ``use`` or ``admin``. The keys of the environment are *use* keys and *admin* keys:

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
from types import MappingProxyType
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.requests import HTTPConnection

from ktrdr_budget.access_keys import AccessKeys, is_secret
from ktrdr_budget.api.problems import HTTPProblem
from ktrdr_budget.environment import check_names
from ktrdr_budget.models import AccessKey, Rights

__all__ = ["BearerKey", "Caller", "Keys", "is_loopback", "permit"]

_READING = ("GET", "HEAD")
_PERMITTED: Mapping[Rights, tuple[Rights, ...]] = {
    "read": ("read",),
    "use": ("read", "use"),
    "admin": ("read", "use", "admin"),
}
"""The rights that each right includes."""
_NO_SCOPE: Mapping[str, str] = MappingProxyType({})


class Caller(NamedTuple):
    """The authenticated sender of a request."""

    owner: str
    """The owner of the caller's holds. The record of a hold has the owner that reserved the hold."""
    name: str
    """The name of the caller's key, for the log of changes."""
    rights: Rights
    scope: Mapping[str, str] = _NO_SCOPE
    """The scope of all requests of the caller; empty if it is not limited to one."""
    may_set: tuple[str, ...] = ()
    """The further fields of a scope that the caller may set."""

    @property
    def admin(self) -> bool:
        """Whether the caller may do everything."""
        return self.rights == "admin"


class Keys:
    """The keys of a service.

    Args:
        use: keys that may use budgets.
        admin: keys that may do everything.
        open_to_all: if there are no keys, serve callers on all machines. Default: only callers on this machine.
    """

    def __init__(self, use: Iterable[str] = (), admin: Iterable[str] = (), *, open_to_all: bool = False) -> None:
        self._callers = [(key.encode(), Caller(_owner(key), _owner(key), "use")) for key in use]
        self._callers += [(key.encode(), Caller(_owner(key), _owner(key), "admin")) for key in admin]
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

    async def authenticate(self, connection: HTTPConnection, access_keys: AccessKeys) -> Caller:
        """Identify the caller of a request.

        Args:
            access_keys: the keys in the store. They are read if the request has a key of their form.

        Raises:
            HTTPProblem: 401 if the key is missing or unknown; 403 if there are no keys and the caller is on another
                machine.
            StoreUnavailable: the store did not reply, so the key cannot be checked.
        """
        scheme, _, sent = connection.headers.get("authorization", "").encode("latin-1").partition(b" ")
        key = sent.strip() if scheme.lower() == b"bearer" else b""
        found = None
        for known, caller in self._callers:  # compare with all keys, so that the time does not show which key matches
            if hmac.compare_digest(known, key):
                found = caller
        if found is not None:
            return found
        secret = key.decode("latin-1")
        if is_secret(secret):
            access_key = await access_keys.find(secret)
            if access_key is None:
                raise _unauthorized("the key is not known, was revoked, or has expired")
            return _caller_with(access_key)
        if not self._callers:
            if self._open_to_all or _is_local(connection.scope.get("client")):
                return _ANONYMOUS
            raise HTTPProblem(
                403,
                "keys-required",
                "this service has no keys, so it serves its own machine only; set KTRDR_API_KEY and KTRDR_ADMIN_KEY",
            )
        raise _unauthorized("the key is not known" if key else "a key is needed: Authorization: Bearer <key>")


def permit(caller: Caller, method: str, *, admin: bool = False) -> Caller:
    """Return the caller if it may send a request.

    Args:
        method: the request's HTTP method: requests that read need less.
        admin: whether the operation is an admin operation, also if it reads.

    Raises:
        HTTPProblem: 403 if the rights of the caller's key do not permit the request, or if the key has a scope.
    """
    if caller.scope:  # until the routes keep to the scope of a key, such a key sees and settles nothing
        raise HTTPProblem(403, "forbidden", "the key has a scope, and this service does not serve such keys yet")
    needed: Rights = "admin" if admin else "read" if method in _READING else "use"
    if needed in _PERMITTED[caller.rights]:
        return caller
    if admin:
        raise HTTPProblem(403, "forbidden", "this operation needs the admin key")
    raise HTTPProblem(403, "forbidden", f"this operation needs a key with the right to {needed}")


class BearerKey(SecurityBase):
    """A dependency that returns the caller, and documents in OpenAPI that a key is needed."""

    def __init__(self, scheme_name: str, setting: str, authenticate: Callable[[Request], Awaitable[Caller]]) -> None:
        self.scheme_name = scheme_name
        self.model = HTTPBearer(description=f"A key of {setting}, or an access key.")
        self._authenticate = authenticate

    async def __call__(self, request: Request) -> Caller:
        """Authenticate the caller."""
        return await self._authenticate(request)


_ANONYMOUS = Caller("http", "http", "admin")


def _caller_with(key: AccessKey) -> Caller:
    return Caller(f"key:{key.name}", key.name, key.rights, key.scope, key.may_set)


def _unauthorized(detail: str) -> HTTPProblem:
    return HTTPProblem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})


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
