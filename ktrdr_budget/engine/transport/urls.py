"""URLs of stores: parsing, validation, and a form without secrets.

=============================================================  =====================================================
``redis://[user:password@]host[:port][/db]``                   one server
``rediss://…``                                                 one server over TLS (also ``rediss+cluster://``, …)
``unix://[user:password@]/path/of/the/socket``                 one server on this machine
``redis+cluster://[user:password@]host:port,host:port,…``      a cluster, through any of these nodes
``redis+sentinel://[user:password@]host:port,…/service[/db]``  the master that these sentinels name
=============================================================  =====================================================

The query holds options: for TLS, with redis-py's names (``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``,
``ssl_cert_reqs``, …); for the connection (``client_name``, ``socket_connect_timeout``, …); and for sentinels with a
login of their own, ``sentinel_username`` and ``sentinel_password``. Reserved characters are percent-encoded in a user
name or a password.
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
"""Options that apply to the sentinels as well."""
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%25[A-Za-z0-9._-]+)?\]")
_PORT = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True, slots=True, repr=False)
class StoreUrl:
    """The parts of a valid URL."""

    scheme: str
    hosts: tuple[Address, ...]
    """Addresses of the server, the cluster nodes or the sentinels; none for a unix socket."""
    path: str = ""
    """Path of a unix socket, still percent-encoded."""
    service: str = ""
    """The master's name in Sentinel."""
    shown: str = ""
    """The URL without its secrets."""
    login: str = field(default="", kw_only=True)
    """``user:password@``, still percent-encoded, or empty."""
    options: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)
    """The options of the query, decoded."""

    def __repr__(self) -> str:
        return f"<StoreUrl {self.shown}>"

    @property
    def kind(self) -> Kind:
        """The kind of the store."""
        return _SCHEMES[self.scheme][0]

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return _SCHEMES[self.scheme][1]

    def at(self, address: Address, **defaults: str) -> str:
        """The URL of one server of this store, for redis-py, including secrets.

        Options in the store's URL take precedence over ``defaults``.
        """
        options = {**defaults, **{name: value for name, value in self.options if not name.startswith("sentinel_")}}
        return self._redis_url(self.login, address, options)

    def sentinel_at(self, address: Address, **defaults: str) -> str:
        """The URL of one sentinel, for redis-py, with the sentinels' own login, if any."""
        given = dict(self.options)
        user, password = (quote(given.get(f"sentinel_{what}", ""), safe="") for what in ("username", "password"))
        shared = {name: value for name, value in self.options if name.startswith("ssl_") or name in _SHARED}
        return self._redis_url(f"{user}:{password}@" if password else "", address, {**defaults, **shared})

    def _redis_url(self, login: str, address: Address, options: dict[str, str]) -> str:
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        query = f"?{urlencode(options)}" if options else ""
        return f"{'rediss' if self.tls else 'redis'}://{login}{host}:{address[1]}{query}"


def check_url(url: str) -> str:
    """Return the URL if it is valid.

    Raises:
        InvalidArgument: the URL is invalid; the message shows no secret.
    """
    parse_url(url)
    return url


def mask_url(url: str) -> str:
    """The URL without its password and query, for logs and errors."""
    try:
        return parse_url(url).shown
    except InvalidArgument:
        return "***"  # in an invalid URL any part may be the password


def parse_url(url: str) -> StoreUrl:
    """Parse a URL.

    Raises:
        InvalidArgument: the text is not the URL of a store; the message shows no secret.
    """
    if not isinstance(url, str):
        raise _invalid("it is not a string")
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _SCHEMES:
        raise _invalid("it must start with one of " + ", ".join(f"{known}://" for known in _SCHEMES))
    if "#" in url or not url.isprintable() or not url.isascii() or (" " in url and scheme != "unix"):
        raise _invalid("a '#', a space and any character outside ASCII must be percent-encoded, also in a password")
    rest, _, query = rest.partition("?")
    place, slash, path = rest.partition("/")
    login, at, hosts = place.rpartition("@")
    kind = _SCHEMES[scheme][0]
    addresses = _addresses(hosts, scheme)
    if scheme != "unix" and "@" in path:
        raise _invalid("a '/', '?' or '@' in a user name or a password must be percent-encoded")
    options = _options(query, scheme)
    service, database = "", path
    if scheme == "unix":
        if not path:
            raise _invalid("unix:// needs the path of a socket: unix:///path")
        database = ""
    elif kind == "sentinel":
        service, _, database = path.partition("/")
        if not service:
            raise _invalid("the name of the service that the sentinels monitor is missing: host:port/name")
    if database:
        if not database.isdecimal() or not database.isascii():
            raise _invalid("the database after the '/' must be a number")
        options = {"db": database, **options}
    if kind == "cluster" and int(options.get("db", "0")):
        raise _invalid("a cluster has only database 0")
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
            raise _invalid("unix:// takes a path and no host: unix:///path")
        return ()
    found = []
    for place in hosts.split(","):
        host, port = place, ""
        if not place.endswith("]"):
            host, _, port = place.partition(":") if place.count(":") <= 1 else place.rpartition(":")
        if not host and kind == "server":
            host = "localhost"
        # Neither is shown: if a separator was not encoded, this is a part of the password.
        if not _HOST.fullmatch(host):
            raise _invalid("a host must be a name or an address (IPv6 in brackets); separate several hosts by commas")
        if (port or place.endswith(":")) and not (_PORT.fullmatch(port) and 1 <= int(port) <= 65535):
            raise _invalid("a port must be a number from 1 to 65535")
        found.append((host.strip("[]").replace("%25", "%"), int(port or _PORTS[kind])))
    if kind == "server" and len(found) > 1:
        raise _invalid("several hosts need redis+cluster:// or redis+sentinel://")
    return tuple(found)


def _options(query: str, scheme: str) -> dict[str, str]:
    kind, tls = _SCHEMES[scheme]
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        # A query with an '@' is the rest of a password that was not encoded.
        shown = f"option {name!r}" if re.fullmatch(r"[a-z_]{1,30}", name) and "@" not in query else "an option"
        form = _OPTIONS.get(name)
        if form is None:
            raise _invalid(f"{shown} is unknown")
        if name in options:
            raise _invalid(f"{shown} is given twice")
        if not form.fullmatch(value):
            raise _invalid(f"the value of {shown} is invalid")
        if name.startswith("ssl_") and not tls:
            raise _invalid(f"{shown} needs rediss://, rediss+cluster:// or rediss+sentinel://")
        if name.startswith("sentinel_") and kind != "sentinel":
            raise _invalid(f"{shown} needs redis+sentinel://")
        options[name] = value
    if "sentinel_username" in options and "sentinel_password" not in options:
        raise _invalid("option 'sentinel_username' needs 'sentinel_password'")
    return options


def _invalid(why: str) -> InvalidArgument:
    return InvalidArgument(f"invalid store URL: {why}")
