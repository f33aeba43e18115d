"""Connects to the store, and tells its failures apart. redis-py is imported at the first connection, not before."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ktrdr_budget.engine.protocol import Command
from ktrdr_budget.engine.scripts import Script, script
from ktrdr_budget.engine.wire import Refusal, Wire, Wires
from ktrdr_budget.errors import BudgetError, InvalidArgument, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from ktrdr_budget.engine.embedded import EmbeddedServer

__all__ = ["NoScript", "Store", "Transient", "mask_url"]

_SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
# Answers of a store that will soon answer otherwise: worth another try within the deadline.
_PASSING = re.compile(r"\b(LOADING|BUSY|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|READONLY|NOREPLICAS)\b")


class Transient(Exception):
    """The store did not answer, or not yet: another try may help. ``sent`` tells whether it may have been executed."""

    def __init__(self, message: str, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


def mask_url(url: str) -> str:
    """The URL without its password and query, fit for logs and errors."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    user = f"{parts.username or ''}:***@" if "@" in parts.netloc else ""
    return f"{parts.scheme}://{user}{host}{parts.path}"


def check_url(url: str) -> str:
    """Refuses a URL whose scheme no store speaks, without showing its secrets."""
    try:
        parts = urlsplit(url)
        usable = isinstance(url, str) and parts.scheme in _SCHEMES and (parts.port is None or parts.port >= 0)
    except (ValueError, AttributeError, TypeError):
        usable = False  # what urlsplit says may quote the password
    if not usable:
        schemes = ", ".join(scheme + "://" for scheme in _SCHEMES)
        raise InvalidArgument(f"the store's URL is not usable; it begins with one of {schemes}")
    return url


class Store:
    """One store, reached through redis-py. Opens by itself; closing is final.

    Args:
        url: where it is; ``None`` starts or joins the embedded server.
        data_dir: the embedded server's data directory.
    """

    def __init__(self, url: str | None, data_dir: str | None = None) -> None:
        self._configured_url = None if url is None else check_url(url)
        self._data_dir = data_dir
        self._client: Any = None
        self._wires = Wires()
        self._server: EmbeddedServer | None = None
        self._opening: asyncio.Lock | None = None
        self._reviving: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Store {self.shown}>"

    @property
    def shown(self) -> str:
        """Where the store is, without secrets."""
        if self._configured_url is not None:
            return mask_url(self._configured_url)
        return self._server.url if self._server is not None else "embedded"

    @property
    def address(self) -> str | None:
        """Where the store is, secrets included; ``None`` for an embedded server that has not been started."""
        return self._configured_url or (self._server.url if self._server is not None else None)

    async def open(self) -> None:
        """Makes the client; starts the embedded server if that is the store.

        Raises:
            StoreUnavailable: the embedded server does not start.
        """
        if self._client is not None:
            return
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if self._client is None:
                self._client = _client(self._configured_url or await self._start_embedded())

    async def _start_embedded(self) -> str:
        from ktrdr_budget.engine import embedded

        if self._server is None:
            try:
                self._server = await asyncio.to_thread(embedded.start, self._data_dir)
            except embedded.EmbeddedServerError as error:
                raise StoreError(str(error)) from None
        return self._server.url

    async def close(self) -> None:
        """Closes connections, and lets go of the embedded server."""
        client, self._client = self._client, None
        await self._wires.close()
        if client is not None:
            await client.aclose()
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.close)

    def forget(self) -> Any:
        """In the child after a fork: the parent's connections are the parent's, and must be kept unused."""
        connections = self._client, self._wires
        self._client, self._wires = None, Wires()
        self._opening = None
        self._reviving = None
        return connections

    @property
    def ready(self) -> bool:
        """Whether a batch can be sent at once."""
        return bool(self._wires.idle)

    def begin(
        self, name: str, keys: Sequence[str], args: Sequence[str], deadline: float, told: Callable[[Any], None]
    ) -> bool:
        """Sends one batch of a write script at once, if a connection is ready for it; returns whether it was.

        Args:
            deadline: the time of the event loop until which an answer is waited for.
            told: is called once, with the answer, or with an exception for :meth:`failure` to explain.
        """
        wire = self._wires.ready()
        if wire is None:
            return False
        wire.send(("EVALSHA", script(name).sha, len(keys), *keys, *args), deadline, told)
        return True

    async def apply(self, name: str, keys: Sequence[str], args: Sequence[str], deadline: float) -> Any:
        """Runs one batch of a write script, connecting first if need be.

        Raises:
            TimeoutError: there was no answer by the deadline, a time of the event loop.
            Transient, StoreError: as for :meth:`execute`.
        """
        lua = script(name)
        async with asyncio.timeout_at(deadline):
            wire = self._wires.ready() or await self._connect()
            if wire is None:
                return await self._evaluate(self.execute, lua, keys, args)
            try:
                return await self._evaluate(partial(self._ask, wire, deadline), lua, keys, args)
            finally:
                wire.give_back()

    async def _connect(self) -> Wire | None:
        await self.open()
        try:
            return await self._wires.connect(self._client)
        except Exception as error:
            failure = self.failure(error)
            if isinstance(failure, Transient):
                failure.sent = False
            raise failure from None

    async def _ask(self, wire: Wire, deadline: float, *words: str | int) -> Any:
        try:
            return await wire.ask(words, deadline)
        except TimeoutError:
            raise
        except Exception as error:
            raise self.failure(error) from None

    async def run(self, command: Command) -> Any:
        """Runs a read script or a plain command."""
        if command.script is not None:
            return await self._evaluate(self.execute, script(command.script), command.keys, command.args)
        return await self.execute(*command.args)

    async def _evaluate(
        self, execute: Callable[..., Awaitable[Any]], lua: Script, keys: Sequence[str], args: Sequence[str | int]
    ) -> Any:
        try:
            return await execute("EVALSHA", lua.sha, len(keys), *keys, *args)
        except NoScript:
            # EVAL loads it on the node that needs it, which SCRIPT LOAD would have to be told.
            return await execute("EVAL", lua.source, len(keys), *keys, *args)

    async def execute(self, *words: Any) -> Any:
        """One command.

        Raises:
            Transient: no answer, or one that will pass.
            StoreError: the store refuses.
        """
        await self.open()
        try:
            return await self._client.execute_command(*words)
        except BudgetError:
            raise
        except Exception as error:
            raise self.failure(error) from None

    def failure(self, error: Exception) -> Exception:
        """What a failure of the driver means; an embedded server that may be gone is looked after."""
        mapped = self._mapped(error)
        if isinstance(mapped, Transient):
            self._revive()
        return mapped

    def _revive(self) -> None:
        """The embedded server's watcher restarts it; should that have been killed as well, somebody must ask."""
        if self._server is not None and (self._reviving is None or self._reviving.done()):
            self._reviving = asyncio.ensure_future(asyncio.to_thread(self._server.ensure))
            self._reviving.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _mapped(self, error: Exception) -> Exception:
        if isinstance(error, (OSError, EOFError)):
            return Transient(f"store at {self.shown}: {type(error).__name__}", sent=True)

        from redis import exceptions as redis_errors

        text = f"store at {self.shown}: {_without_secrets(error)}"
        if isinstance(error, redis_errors.NoScriptError) or str(error).startswith("NOSCRIPT"):
            return NoScript()
        refused = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
        if isinstance(error, refused) or isinstance(error.__cause__, refused):  # on a unix socket, only the cause
            return StoreError(text)
        if isinstance(error, redis_errors.ClusterError) or _PASSING.search(str(error)):
            return Transient(text, sent=False)
        # A cluster client that reaches no node says so by an error that is no RedisError.
        lost = (redis_errors.ConnectionError, redis_errors.TimeoutError, redis_errors.RedisClusterException)
        if isinstance(error, lost):
            return Transient(text, sent=" connecting to " not in str(error))
        if isinstance(error, (redis_errors.RedisError, Refusal)):
            return StoreError(text)
        return error


class NoScript(Exception):
    """The store does not have the script (a restart, SCRIPT FLUSH, another node)."""


def _without_secrets(error: Exception) -> str:
    """An error's first line; servers and drivers put no password there, but a URL may have got in."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"(\w+://)[^@\s/]*@", r"\1***@", line)[:300]


def _client(url: str) -> Any:
    """A redis-py client that does not retry: retries are bounded by each call's deadline, which it does not know."""
    import redis.asyncio as redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from ktrdr_budget.engine.packing import pool_of

    try:
        scheme = urlsplit(url).scheme
        if scheme.endswith("+cluster"):
            plain = url.replace("+cluster", "", 1)
            return redis.RedisCluster.from_url(plain, socket_timeout=None)
        options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "socket_timeout": None, "protocol": 2}
        return redis.Redis.from_pool(pool_of(url, **options))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"the store's URL is not usable: {_without_secrets(error)}") from None


def unavailable(error: Exception | None, shown: str, timeout: float, *, ambiguous: bool = False) -> StoreUnavailable:
    """What a caller gets when its deadline has passed."""
    if isinstance(error, Transient):
        return StoreUnavailable(f"{error} (gave up after {timeout:g} s)", ambiguous=ambiguous)
    return StoreUnavailable(f"store at {shown} gave no answer within {timeout:g} s", ambiguous=ambiguous)
