"""Login credentials that rotate: each connection fetches them again, and no error shows them."""

from __future__ import annotations

import pytest
from redis import exceptions
from redis.credentials import CredentialProvider

from ktrdr_budget.engine.transport.credentials import Credentials, credentials_for
from ktrdr_budget.engine.transport.errors import Transient, translate
from ktrdr_budget.engine.transport.urls import parse_url


class Provider(CredentialProvider):
    """A provider that inherits redis-py's method for async clients."""

    def get_credentials(self) -> tuple[str, str]:
        return "worker", "sync"


class AsyncProvider(Provider):
    async def get_credentials_async(self) -> tuple[str, str]:
        return "worker", "async"


def test_a_callable_source_of_credentials_is_called_for_each_connection():
    passwords = iter(["first", "second"])
    credentials = Credentials(lambda: next(passwords))
    assert [credentials.get_credentials() for _ in range(2)] == [("first",), ("second",)]


@pytest.mark.parametrize(
    ("source", "fetched"),
    [(lambda: ["worker", "sync"], "sync"), (Provider(), "sync"), (AsyncProvider(), "async")],
)
async def test_an_async_client_gets_credentials_from_any_kind_of_source(source, fetched):
    assert await Credentials(source).get_credentials_async() == ("worker", fetched)


def test_an_error_of_a_source_of_credentials_is_shown_without_its_message():
    def source() -> str:
        raise RuntimeError("token secret-1 has expired")

    with pytest.raises(exceptions.ConnectionError, match="credential_provider raised RuntimeError$") as raised:
        Credentials(source).get_credentials()
    assert raised.value.__suppress_context__, "a stack trace shows no secret either"
    translated = translate(raised.value, "redis://store")
    assert isinstance(translated, Transient)
    assert not translated.sent, "the login failed before a request was sent"


def test_the_repr_of_credentials_does_not_show_their_source():
    assert repr(Credentials(Provider())) == "<Credentials>"


def test_a_store_without_a_provider_has_no_credentials():
    assert credentials_for(None, parse_url("redis://worker:password@store")) is None


def test_a_credentials_object_is_not_wrapped_again():
    credentials = Credentials(Provider())
    assert credentials_for(credentials, parse_url("redis://store")) is credentials
