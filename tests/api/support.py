"""Shared parts of the tests of the service: an app in this process, and checks of responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from fastapi import FastAPI

URL = "http://service"
V1 = "/api/v1"

BUDGETS = """
[[budgets]]
name = "team/a:b@c"
limit = "1.00"
period = "month"
timezone = "Europe/Rome"

[[budgets]]
name = "team/holds"
limit = 2.50

[[budgets]]
name = "cycles"
limit = 3
unit = "cycles"

[[budgets]]
name = "calls"
limit = 2
unit = "requests"
period = "hour"

[[budgets]]
name = "jobs"
limit = 1
kind = "slots"

[[budgets]]
name = "free"
limit = "unlimited"
period = "ever"
"""


def connect(app: Any, *, key: str = "", address: str = "127.0.0.1") -> httpx.AsyncClient:
    """A client of an app in this process. The app sees requests with this bearer key and from this address."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(address, 40_000))
    return httpx.AsyncClient(transport=transport, base_url=URL, headers=headers)


class Running:
    """A running service and a client of it."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.client = connect(app)

    @property
    def limiter(self) -> Any:
        return self.app.state.limiter

    def connect(self, key: str = "", *, address: str = "127.0.0.1") -> httpx.AsyncClient:
        """Another client of the service."""
        return connect(self.app, key=key, address=address)


Start = Callable[..., Awaitable[Running]]


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check that a response is a problem document, and return the document."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["type"] == f"urn:ktrdr-budget:problem:{code}"
    assert document["code"] == code
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    return document


async def reserved(client: httpx.AsyncClient, amounts: Any = None, **fields: Any) -> dict[str, Any]:
    """Reserve; return the document of the hold."""
    response = await client.post(f"{V1}/reservations", json={"amounts": amounts or {"agent": "0.15"}, **fields})
    assert response.status_code == 201, response.text
    return response.json()


async def figures(client: httpx.AsyncClient, name: str = "agent") -> tuple[Any, Any, Any, Any]:
    """The spent, held, unconfirmed and remaining amounts of a budget."""
    response = await client.get(f"{V1}/budgets/{name.replace('/', '%2F')}")
    assert response.status_code == 200, response.text
    document = response.json()
    return tuple(document[name] for name in ("spent", "held", "unconfirmed", "remaining"))
