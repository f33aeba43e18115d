"""The store of a limiter. The store's URL determines the kind of store.

The kinds are a single server, a server behind Sentinel, a server of a cluster, and the embedded server.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ktrdr_budget.engine.transport.credentials import CredentialSource, credentials_for
from ktrdr_budget.engine.transport.errors import Transient
from ktrdr_budget.engine.transport.failover import FailoverStore
from ktrdr_budget.engine.transport.store import Store
from ktrdr_budget.engine.transport.urls import parse_url
from ktrdr_budget.errors import StoreError

if TYPE_CHECKING:
    from ktrdr_budget.engine.embedded import EmbeddedServer

__all__ = ["EmbeddedStore", "store_for"]


def store_for(
    url: str | None, data_dir: str | None, key: str, credential_provider: CredentialSource | None = None
) -> Store:
    """Create the store of a limiter.

    Args:
        url: the URL of the store; ``None`` for the embedded server.
        data_dir: the embedded server's data directory; not used with a URL.
        key: any key of the tenant, which determines the slot in a cluster.
        credential_provider: provides the login at each connection; if ``None``, the URL contains the login, if any.

    Raises:
        InvalidArgument: the URL or the provider is not usable.
    """
    parsed = None if url is None else parse_url(url)
    credentials = credentials_for(credential_provider, parsed)
    if url is None or parsed is None:
        return EmbeddedStore(data_dir)
    if parsed.kind == "server":
        return Store(url, credentials)
    return FailoverStore(url, parsed, key, credentials)


class EmbeddedStore(Store):
    """A store on an embedded server. The first connection starts the server of the data directory, or joins it."""

    def __init__(self, data_dir: str | None) -> None:
        super().__init__(None)
        self._data_dir = data_dir
        self._server: EmbeddedServer | None = None
        self._restarting: asyncio.Future[None] | None = None

    @property
    def shown(self) -> str:
        """See :class:`Store`."""
        return "embedded" if self._server is None else self._server.url

    async def _server_url(self) -> str:
        from ktrdr_budget.engine import embedded

        if self._server is None:
            try:
                self._server = await asyncio.to_thread(embedded.start, self._data_dir)
            except embedded.EmbeddedServerError as error:
                raise StoreError(str(error)) from None
            self.address = self._server.url
        return self._server.url

    async def close(self) -> None:
        """Close all connections, and leave the embedded server."""
        await super().close()
        restarting, self._restarting = self._restarting, None
        if restarting is not None and not restarting.done():
            restarting.cancel()
            await asyncio.wait({restarting})
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.close)

    def forget(self) -> Any:
        """See :class:`Store`."""
        self._restarting = None
        return super().forget()

    def failure(self, error: Exception) -> Exception:
        """See :class:`Store`.

        After a connection failure, the embedded server and its supervisor are started again if both have died.
        """
        translated = super().failure(error)
        if isinstance(translated, Transient):
            self._restart()
        return translated

    def _restart(self) -> None:
        if self._server is not None and (self._restarting is None or self._restarting.done()):
            self._restarting = asyncio.ensure_future(asyncio.to_thread(self._server.ensure))
            self._restarting.add_done_callback(lambda task: task.cancelled() or task.exception())
