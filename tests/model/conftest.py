"""One event loop for the histories of a module."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """All histories of a module share its loop."""
    with asyncio.Runner() as runner:
        runner.get_loop()
        yield runner
