"""Login credentials that rotate. They are fetched for each connection, and never shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ktrdr_budget.engine.transport.urls import StoreUrl
from ktrdr_budget.errors import InvalidArgument

__all__ = ["CredentialSource", "Credentials", "credentials_for"]

CredentialSource = Any
"""A ``CredentialProvider`` of redis-py, or a callable without arguments. Either returns ``(username, password)``,
``(password,)`` or a password. (The type is ``Any``, because redis-py is imported only at the first connection.)"""


class Credentials:
    """A ``CredentialProvider`` that wraps the caller's provider, and hides errors that might show a secret."""

    def __init__(self, source: CredentialSource) -> None:
        fetch = getattr(source, "get_credentials", source)
        if not callable(fetch):
            raise InvalidArgument("credential_provider must be a CredentialProvider of redis-py, or a callable")
        self._fetch: Callable[[], Any] = fetch
        fetch_async = getattr(source, "get_credentials_async", None)
        # The inherited method of redis-py's base class logs a warning, and blocks the event loop.
        inherited = getattr(fetch_async, "__qualname__", "") == "CredentialProvider.get_credentials_async"
        self._fetch_async = None if inherited else fetch_async

    def __repr__(self) -> str:
        return "<Credentials>"

    def get_credentials(self) -> tuple[str, ...]:
        """Fetch the credentials; called by redis-py for each connection of a synchronous client."""
        try:
            fetched = self._fetch()
        except Exception as error:
            raise _provider_error(error) from None
        return _validated(fetched)

    async def get_credentials_async(self) -> tuple[str, ...]:
        """Fetch the credentials; called by redis-py for each connection.

        If the caller's provider has no async method, the provider is called in a thread.
        """
        if self._fetch_async is None:
            return await asyncio.to_thread(self.get_credentials)
        try:
            fetched = await self._fetch_async()
        except Exception as error:
            raise _provider_error(error) from None
        return _validated(fetched)


def credentials_for(source: CredentialSource | None, url: StoreUrl | None) -> Credentials | None:
    """The credentials of a store, from the option ``credential_provider``.

    Args:
        url: the store's URL; ``None`` for the embedded server, which has no users.

    Raises:
        InvalidArgument: ``source`` is not a provider, there is no URL, or the URL contains a login as well.
    """
    if source is None:
        return None
    if url is None:
        raise InvalidArgument("credential_provider needs the URL of a store; the embedded server has no users")
    if url.login or any(name in ("username", "password") for name, _ in url.options):
        raise InvalidArgument("give the store's login in its URL or by credential_provider, not both")
    return source if isinstance(source, Credentials) else Credentials(source)


def _validated(fetched: Any) -> tuple[str, ...]:
    words = (fetched,) if isinstance(fetched, str) else fetched
    if isinstance(words, (tuple, list)) and 1 <= len(words) <= 2 and all(isinstance(word, str) for word in words):
        return tuple(words)
    from redis.exceptions import AuthenticationError

    raise AuthenticationError("credential_provider must return a password, or a user name and a password")


def _provider_error(error: Exception) -> Exception:
    from redis import exceptions

    # redis-py closes the connection after this class; the wording lets translate() see that nothing was sent.
    return exceptions.ConnectionError(
        f"Error connecting to the store: credential_provider raised {type(error).__name__}"
    )
