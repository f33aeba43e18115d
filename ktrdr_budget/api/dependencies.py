"""A budget for a route of any FastAPI app: ``Depends(hold_budget("agent", estimate="0.15"))``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from ktrdr_budget.api.problems import HTTPProblem, problem_of
from ktrdr_budget.engine.replica.hold import OnError, current_hold, restore_hold
from ktrdr_budget.errors import (
    BudgetError,
    BudgetExceeded,
    InvalidArgument,
    StoreUnavailable,
    TooManyBudgets,
    TooManyHolds,
)
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.metering.defaults import default_async_limiter
from ktrdr_budget.metering.hold_arguments import (
    LABEL_CHARACTERS_MAX,
    Limiter,
    check_hold_arguments,
    check_limiter_source,
)
from ktrdr_budget.models import TTL_DEFAULT_S, OnExpiry
from ktrdr_budget.money import AmountIn
from ktrdr_budget.sync import Hold

__all__ = ["BudgetProblem", "hold_budget"]

logger = logging.getLogger("ktrdr_budget")

CLOSE_DENIED = 1008
CLOSE_TRY_LATER = 1013
"""Codes of RFC 6455 and its registry, for WebSockets that are open already: policy violation, and try again later."""
_CLOSE_REASON_BYTES_MAX = 123
_REFUSALS = (BudgetExceeded, TooManyHolds, TooManyBudgets, StoreUnavailable)


class BudgetProblem(HTTPException):
    """A route has no room in its budget (429), or the budget cannot be asked (503).

    The answer is ``application/problem+json``. A WebSocket that was accepted already is closed, with code 1008 (429) or
    1013 (503). An app may handle it otherwise, as any exception.
    """

    def __init__(self, problem: HTTPProblem) -> None:
        super().__init__(problem.status_code, problem.detail, problem.headers)
        self.problem = problem

    def response(self) -> Response:
        """The answer."""
        return self.problem.response()


def hold_budget(
    budget: str | Mapping[str, AmountIn],
    estimate: AmountIn | None = None,
    *,
    limiter: Limiter | Callable[[Any], Limiter] | None = None,
    ttl: float = TTL_DEFAULT_S,
    on_expiry: OnExpiry = "charge",
    on_error: OnError = "release",
    operation: str | None = None,
) -> Callable[[HTTPConnection], AsyncIterator[Any]]:
    """A dependency that holds an estimate while a route answers, and hands it the hold. Also for WebSocket routes.

    Without room the route does not run: the answer is 429, as a problem document, and so it is if a call inside is
    denied; 503 if the store does not answer. A route that answers, whatever the
    status, commits what was accrued (by metered or guarded calls, or ``hold.accrue``), or else the estimate. A route
    that raises commits what was accrued, or releases. Both happen after the answer has been sent, streams included,
    unless FastAPI is told otherwise with ``Depends(..., scope="function")``.

    A WebSocket whose client disconnects has ended like any other: that releases nothing, for else a client could choose
    not to pay.

    Args:
        budget: a name with ``estimate``, or a mapping of names to estimates.
        limiter: an :class:`AsyncBudgetLimiter` of the app's event loop, for routes of ``async def``; a
            :class:`BudgetLimiter` for those of ``def``, so that a guarded sync client inside draws from the hold, which
            then is a :class:`~ktrdr_budget.sync.Hold`; or a function of the request (or WebSocket) that returns one.
            By default what :func:`~ktrdr_budget.metering.decorators.set_default_limiter` was given for async code, or
            one made from the environment.
        operation: a label for the ledger; by default the route, such as ``POST /research/{topic}``, or
            ``WEBSOCKET /live``.
        ttl, on_expiry, on_error: as for ``limiter.hold(...)``.

    Raises:
        InvalidArgument: an argument is not usable.
        UnknownBudget: the limiter that is given was not given such a budget.
    """
    check_limiter_source(limiter, ["request"])
    check_hold_arguments(
        budget, estimate, limiter, ttl=ttl, on_expiry=on_expiry, on_error=on_error, operation=operation
    )

    async def held(connection: HTTPConnection) -> AsyncIterator[Any]:
        chosen = _chosen(limiter, connection)
        label = _route(connection) if operation is None else operation
        options = {"ttl": ttl, "on_expiry": on_expiry, "operation": label[:LABEL_CHARACTERS_MAX]}
        try:
            hold, kept = await _reserved(chosen, budget, estimate, on_error, options)
        except _REFUSALS as error:
            raise _refused(connection, error, chosen) from error
        failed: BaseException | None = None
        disconnected: WebSocketDisconnect | None = None
        try:
            async with kept:
                try:
                    yield hold
                except WebSocketDisconnect as error:
                    disconnected = error
                except BaseException as error:
                    failed = error
                    raise
        except BudgetError as error:
            if error is failed:
                if isinstance(error, _REFUSALS):
                    raise _refused(connection, error, chosen) from error
                raise
            # The route has answered, and perhaps it was paid for: that is not taken back.
            logger.error("hold %s could not be settled: %s", hold.id, error)
        if disconnected is not None:
            raise disconnected

    return held


def _chosen(limiter: Limiter | Callable[[Any], Limiter] | None, connection: HTTPConnection) -> Limiter:
    if limiter is None:
        return default_async_limiter()
    chosen = limiter if isinstance(limiter, Limiter) else limiter(connection)
    if not isinstance(chosen, Limiter):
        raise InvalidArgument(
            f"the limiter of a route must be an AsyncBudgetLimiter or a BudgetLimiter, not {chosen!r}"
        )
    return chosen


async def _reserved(
    limiter: Limiter,
    budget: str | Mapping[str, AmountIn],
    estimate: AmountIn | None,
    on_error: OnError,
    options: Mapping[str, Any],
) -> tuple[Any, AbstractAsyncContextManager[Any]]:
    """A hold, and what keeps it until it is left."""
    if isinstance(limiter, AsyncBudgetLimiter):
        hold = await limiter.reserve(budget, estimate, **options)
        return hold, limiter.keep(hold, on_error=on_error)
    kept = limiter.hold(budget, estimate, on_error=on_error, **options)
    entering = asyncio.ensure_future(run_in_threadpool(kept.__enter__))
    try:
        held = await asyncio.shield(entering)
    except asyncio.CancelledError:
        entering.add_done_callback(partial(_give_back, kept))
        raise
    return held, _left_in_thread(kept, held)


def _give_back(kept: AbstractContextManager[Hold], entering: asyncio.Future[Hold]) -> None:
    """Releases what was granted to a request that nobody waits for any more."""
    if not entering.cancelled() and entering.exception() is None:
        error = asyncio.CancelledError()
        entering.get_loop().run_in_executor(None, kept.__exit__, type(error), error, None)


@asynccontextmanager
async def _left_in_thread(kept: AbstractContextManager[Hold], hold: Hold) -> AsyncIterator[None]:
    """Makes a hold current here, for what a thread has made so is so in that thread; and leaves it by a thread."""
    outer = current_hold.set(hold)
    leaving: tuple[Any, Any, Any] = (None, None, None)
    try:
        yield
    except BaseException as error:
        leaving = type(error), error, error.__traceback__
        raise
    finally:
        restore_hold(outer)
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(kept.__exit__, *leaving)


def _route(connection: HTTPConnection) -> str:
    """The route's pattern, which unlike the path holds nothing of its caller."""
    path = getattr(connection.scope.get("route"), "path", "")
    return f"{connection.scope.get('method', 'WEBSOCKET')} {path}".strip()


def _refused(connection: HTTPConnection, error: BudgetError, limiter: Limiter) -> BudgetProblem:
    _handle_problems(connection)
    return BudgetProblem(problem_of(error, limiter.budgets))


def _handle_problems(connection: HTTPConnection) -> None:
    """Make the app answer with problem documents, if it does not handle them itself.

    Starlette keeps the handlers that are in force in the request's scope. Should that change, its handler for any
    ``HTTPException`` still answers with the right status and headers.
    """
    handlers = connection.scope.get("starlette.exception_handlers")
    if handlers:
        handlers[0].setdefault(BudgetProblem, _answer)


async def _answer(connection: HTTPConnection, error: BudgetProblem) -> Response | None:
    if not isinstance(connection, WebSocket):
        return error.response()
    opening = connection.application_state is WebSocketState.CONNECTING
    if opening and "websocket.http.response" in (connection.scope.get("extensions") or {}):
        return error.response()  # in place of the handshake
    code = CLOSE_TRY_LATER if error.status_code == HTTPStatus.SERVICE_UNAVAILABLE else CLOSE_DENIED
    reason = error.problem.detail.encode()[:_CLOSE_REASON_BYTES_MAX].decode(errors="ignore")
    if WebSocketState.DISCONNECTED not in (connection.application_state, connection.client_state):
        with suppress(WebSocketDisconnect):  # the client may leave just now
            await connection.close(code, reason)
    return None
