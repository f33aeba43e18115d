"""URLs of stores: read, checked, and shown without their secrets.

=============================================================  =====================================================
``redis://[user:password@]host[:port][/db]``                   one server
``rediss://…``                                                 the same, and all below with this ``s``, through TLS
``unix://[user:password@]/path/of/the/socket``                 one server of this machine
``redis+cluster://[user:password@]host:port,host:port,…``      a cluster, found through any of these nodes
``redis+sentinel://[user:password@]host:port,…/service[/db]``  the master that these sentinels name
=============================================================  =====================================================

Options follow as a query: those of TLS as redis-py spells them (``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``,
``ssl_cert_reqs``, …), some of the connection (``client_name``, ``socket_connect_timeout``, …), and for sentinels that
want a login of their own ``sentinel_username`` and ``sentinel_password``. What has a meaning in a URL is
percent-encoded in a name or password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode

from ktrdr_budget.errors import InvalidArgument

__all__ = ["Address", "StoreUrl", "check_url", "mask_url", "parse_url"]

Address = tuple[str, int]
Kind = Literal["server", "cluster", "sentinel"]

_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("server", False),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
}
_PORTS: dict[Kind, int] = {"server": 6379, "cluster": 6379, "sentinel": 26379}
_BOOLEAN = re.compile(r"(?i:true|false|yes|no|y|n|t|f|1|0|on|off)?")
_OPTIONS = {
    "db": re.compile(r"\d{1,9}"),
    "username": re.compile(r".+"),
    "password": re.compile(r".*"),
    "client_name": re.compile(r"[!-~]+"),
    "socket_connect_timeout": re.compile(r"\d+(\.\d+)?"),
    "socket_timeout": re.compile(r"\d+(\.\d+)?"),
    "socket_keepalive": _BOOLEAN,
    "health_check_interval": re.compile(r"\d{1,9}"),
    "max_connections": re.compile(r"\d{1,9}"),
    "ssl_ca_certs": re.compile(r".+"),
    "ssl_ca_path": re.compile(r".+"),
    "ssl_ca_data": re.compile(r"(?s:.+)"),
    "ssl_certfile": re.compile(r".+"),
    "ssl_keyfile": re.compile(r".+"),
    "ssl_password": re.compile(r".*"),
    "ssl_cert_reqs": re.compile(r"none|optional|required"),
    "ssl_check_hostname": _BOOLEAN,
    "ssl_ciphers": re.compile(r".+"),
    "ssl_min_version": re.compile(r"\d{1,5}"),
    "sentinel_username": re.compile(r".+"),
    "sentinel_password": re.compile(r".+"),
}
_SHARED = ("socket_connect_timeout", "socket_keepalive")
"""Options that hold for the sentinels, too."""
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%25[A-Za-z0-9._-]+)?\]")
_PORT = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True, slots=True, repr=False)
class StoreUrl:
    """A URL that is in order, in its parts."""

    scheme: str
    hosts: tuple[Address, ...]
    """Of the server, the nodes or the sentinels; none for a unix socket."""
    path: str = ""
    """Of a unix socket, as it stands in the URL."""
    service: str = ""
    """By which the sentinels know the master."""
    shown: str = ""
    """The URL without its secrets."""
    login: str = field(default="", kw_only=True)
    """``user:password@`` as it stands in the URL, or nothing."""
    options: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)
    """The query, decoded."""

    def __repr__(self) -> str:
        return f"<StoreUrl {self.shown}>"

    @property
    def kind(self) -> Kind:
        """What stands behind it."""
        return _SCHEMES[self.scheme][0]

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return _SCHEMES[self.scheme][1]

    def at(self, address: Address, **defaults: str) -> str:
        """The URL, secrets included, of one server of this store, for redis-py; ``defaults`` are further options."""
        options = {**defaults, **{name: value for name, value in self.options if not name.startswith("sentinel_")}}
        return self._one(self.login, address, options)

    def sentinel_at(self, address: Address, **defaults: str) -> str:
        """The same for one of the sentinels, which has a login of its own, or none."""
        given = dict(self.options)
        user, password = (quote(given.get(f"sentinel_{what}", ""), safe="") for what in ("username", "password"))
        shared = {name: value for name, value in self.options if name.startswith("ssl_") or name in _SHARED}
        return self._one(f"{user}:{password}@" if password else "", address, {**defaults, **shared})

    def _one(self, login: str, address: Address, options: dict[str, str]) -> str:
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        query = f"?{urlencode(options)}" if options else ""
        return f"{'rediss' if self.tls else 'redis'}://{login}{host}:{address[1]}{query}"


def check_url(url: str) -> str:
    """Returns the URL, if it is in order.

    Raises:
        InvalidArgument: it is not; the words show no secret.
    """
    parse_url(url)
    return url


def mask_url(url: str) -> str:
    """The URL without its password and query, fit for logs and errors."""
    try:
        return parse_url(url).shown
    except InvalidArgument:
        return "***"  # of a URL that is not in order nobody knows which part is the password


def parse_url(url: str) -> StoreUrl:
    """Takes a URL apart.

    Raises:
        InvalidArgument: it is not the URL of a store; the words show no secret.
    """
    if not isinstance(url, str):
        raise _unusable("it is no text")
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _SCHEMES:
        raise _unusable("it must start with one of " + ", ".join(f"{known}://" for known in _SCHEMES))
    if "#" in url or not url.isprintable() or not url.isascii() or (" " in url and scheme != "unix"):
        raise _unusable("a '#', a space and what is not ASCII is percent-encoded, also in a password")
    rest, _, query = rest.partition("?")
    place, slash, path = rest.partition("/")
    login, at, hosts = place.rpartition("@")
    kind = _SCHEMES[scheme][0]
    addresses = _addresses(hosts, scheme)
    if scheme != "unix" and "@" in path:
        raise _unusable("a '/', '?' or '@' in a user's name or password is percent-encoded")
    options = _options(query, scheme)
    service, database = "", path
    if scheme == "unix":
        if not path:
            raise _unusable("unix:// is followed by the path of a socket: unix:///path")
        database = ""
    elif kind == "sentinel":
        service, _, database = path.partition("/")
        if not service:
            raise _unusable("the name of the service that the sentinels watch is missing: host:port/name")
    if database:
        if not database.isdecimal() or not database.isascii():
            raise _unusable("what follows the '/' is no number of a database")
        options = {"db": database, **options}
    if kind == "cluster" and int(options.get("db", "0")):
        raise _unusable("a cluster has one database, 0")
    user = f"{login.partition(':')[0]}:***@" if at else ""
    return StoreUrl(
        scheme,
        addresses,
        f"/{path}" if scheme == "unix" else "",
        unquote(service),
        f"{scheme}://{user}{hosts}{slash}{path}",
        login=f"{login}@" if at else "",
        options=tuple(options.items()),
    )


def _addresses(hosts: str, scheme: str) -> tuple[Address, ...]:
    kind = _SCHEMES[scheme][0]
    if scheme == "unix":
        if hosts:
            raise _unusable("unix:// names a path and no host: unix:///path")
        return ()
    found = []
    for place in hosts.split(","):
        host, port = place, ""
        if not place.endswith("]"):
            host, _, port = place.partition(":") if place.count(":") <= 1 else place.rpartition(":")
        if not host and kind == "server":
            host = "localhost"
        # Neither is shown: where a separator is not encoded, a part of the password comes to stand here.
        if not _HOST.fullmatch(host):
            raise _unusable(
                "a host is a name or an address, an IPv6 address in brackets; several are separated by commas"
            )
        if (port or place.endswith(":")) and not (_PORT.fullmatch(port) and 1 <= int(port) <= 65535):
            raise _unusable("a port is a number from 1 to 65535")
        found.append((host.strip("[]").replace("%25", "%"), int(port or _PORTS[kind])))
    if kind == "server" and len(found) > 1:
        raise _unusable("several hosts need redis+cluster:// or redis+sentinel://")
    return tuple(found)


def _options(query: str, scheme: str) -> dict[str, str]:
    kind, tls = _SCHEMES[scheme]
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        # With an '@' in it, this is no query but the rest of a password that was not encoded.
        shown = f"option {name!r}" if re.fullmatch(r"[a-z_]{1,30}", name) and "@" not in query else "an option"
        form = _OPTIONS.get(name)
        if form is None:
            raise _unusable(f"{shown} is unknown")
        if name in options:
            raise _unusable(f"{shown} is given twice")
        if not form.fullmatch(value):
            raise _unusable(f"the value of {shown} is not usable")
        if name.startswith("ssl_") and not tls:
            raise _unusable(f"{shown} needs rediss://, rediss+cluster:// or rediss+sentinel://")
        if name.startswith("sentinel_") and kind != "sentinel":
            raise _unusable(f"{shown} needs redis+sentinel://")
        options[name] = value
    if "sentinel_username" in options and "sentinel_password" not in options:
        raise _unusable("option 'sentinel_username' needs 'sentinel_password'")
    return options


def _unusable(why: str) -> InvalidArgument:
    return InvalidArgument(f"invalid store URL: {why}")
