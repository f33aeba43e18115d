"""Credentials of the store that rotate: asked for at each connection, shown nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ktrdr_budget.engine.transport.urls import StoreUrl
from ktrdr_budget.errors import InvalidArgument

__all__ = ["CredentialSource", "Credentials", "credentials_for"]

CredentialSource = Any
"""A ``CredentialProvider`` of redis-py, or a callable without arguments. Either returns ``(username, password)``,
``(password,)`` or a password. (Not spelled as types: redis-py is imported at the first connection only.)"""


class Credentials:
    """What redis-py asks, sync or async; in place of the provider, whose errors may show a secret."""

    def __init__(self, source: CredentialSource) -> None:
        ask = getattr(source, "get_credentials", source)
        if not callable(ask):
            raise InvalidArgument("credential_provider must be a CredentialProvider of redis-py, or a callable")
        self._ask: Callable[[], Any] = ask
        ask_async = getattr(source, "get_credentials_async", None)
        # That of redis-py's base class logs a warning, and blocks the event loop.
        inherited = getattr(ask_async, "__qualname__", "") == "CredentialProvider.get_credentials_async"
        self._ask_async = None if inherited else ask_async

    def __repr__(self) -> str:
        return "<Credentials>"

    def get_credentials(self) -> tuple[str, ...]:
        """Called by redis-py for each connection of a synchronous client."""
        try:
            given = self._ask()
        except Exception as error:
            raise _failed(error) from None
        return _checked(given)

    async def get_credentials_async(self) -> tuple[str, ...]:
        """Called by redis-py for each connection; a callable runs in a thread, for it may ask a secret store."""
        if self._ask_async is None:
            return await asyncio.to_thread(self.get_credentials)
        try:
            given = await self._ask_async()
        except Exception as error:
            raise _failed(error) from None
        return _checked(given)


def credentials_for(source: CredentialSource | None, url: StoreUrl | None) -> Credentials | None:
    """The credentials of a store.

    Args:
        url: ``None`` is the embedded server, which has no users.

    Raises:
        InvalidArgument: it is no provider, or there is a login in the URL as well.
    """
    if source is None:
        return None
    if url is None:
        raise InvalidArgument("credential_provider needs the URL of a store; the embedded server has no users")
    if url.login or any(name in ("username", "password") for name, _ in url.options):
        raise InvalidArgument("give the store's login in its URL or by credential_provider, not both")
    return source if isinstance(source, Credentials) else Credentials(source)


def _checked(given: Any) -> tuple[str, ...]:
    words = (given,) if isinstance(given, str) else given
    if isinstance(words, (tuple, list)) and 1 <= len(words) <= 2 and all(isinstance(word, str) for word in words):
        return tuple(words)
    from redis.exceptions import AuthenticationError

    raise AuthenticationError("credential_provider must return a password, or a user name and a password")


def _failed(error: Exception) -> Exception:
    from redis import exceptions

    # Of a class that redis-py cleans up after, and in words that say that nothing was sent.
    return exceptions.ConnectionError(
        f"Error connecting to the store: credential_provider raised {type(error).__name__}"
    )
