"""Fixtures: the local provider, and guarded clients of the real SDKs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from examples.local_provider import LocalProvider

from ...helpers.guarded import guarded


@pytest.fixture(scope="session")
def _running_provider() -> Iterator[LocalProvider]:
    with LocalProvider() as provider:
        yield provider


@pytest.fixture
def provider(_running_provider: LocalProvider) -> LocalProvider:
    """A provider with an empty ledger."""
    _running_provider.clear()
    return _running_provider


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def guarded_client(provider: LocalProvider, server: Any) -> Callable[..., Any]:
    """``guarded_client(sdk, is_async, **options)``, see :func:`guarded`."""
    return lambda sdk, is_async, **options: guarded(sdk, is_async, provider, server, **options)


@pytest.fixture
def opened(guarded_client: Callable[..., Any], is_async: bool) -> Callable[..., Any]:
    """``opened(sdk, **options)``: a guarded client; the test runs once with a sync and once with an async client."""
    return lambda sdk, **options: partial(guarded_client, is_async=is_async)(sdk, **options)
