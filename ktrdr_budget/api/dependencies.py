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
"""Close codes of WebSockets, registered by IANA: 1008 is *policy violation*, 1013 is *try again later*."""
_CLOSE_REASON_BYTES_MAX = 123
_REFUSALS = (BudgetExceeded, TooManyHolds, TooManyBudgets, StoreUnavailable)


class BudgetProblem(HTTPException):
    """A budget of a route has no room (429), or the store is unreachable (503).

    The response is ``application/problem+json``. An accepted WebSocket is closed with code 1008 (429) or 1013 (503). An
    app may register its own handler, as for any exception.
    """

    def __init__(self, problem: HTTPProblem) -> None:
        super().__init__(problem.status_code, problem.detail, problem.headers)
        self.problem = problem

    def response(self) -> Response:
        """Build the response."""
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
    """Make a dependency that holds an estimate while a route runs. The value of the dependency is the hold.

    The route may be a WebSocket route.

    If a budget has no room, the route does not run, and the response is a problem document with status 429. If a call
    inside the route is denied, the response is the same. If the store is unreachable, the response has status 503.

    Metered calls, guarded calls and ``hold.accrue`` accrue an amount. If the route returns with any status, the accrued
    amount is committed; if nothing was accrued, the estimate is committed. If the route raises, the accrued amount is
    committed; if nothing was accrued, the hold is released. The hold is settled after the whole response was sent,
    streams included, unless the dependency is ``Depends(..., scope="function")``.

    If a client disconnects a WebSocket, the hold is settled as if the route had returned, because a client must not be
    able to avoid the charge.

    Args:
        budget: the name of a budget, or a mapping of names to estimates.
        estimate: the amount to hold, if ``budget`` is a name.
        limiter: for an ``async def`` route, an :class:`AsyncBudgetLimiter` of the app's event loop; for a ``def``
            route, a :class:`BudgetLimiter`. If ``limiter`` is a function, the function is called with the request (or
            WebSocket), and must return a limiter. With a :class:`BudgetLimiter`, the hold is a
            :class:`~ktrdr_budget.sync.Hold`, and a guarded sync client inside the route draws from the hold.
            Default: the argument of :func:`~ktrdr_budget.metering.decorators.set_default_limiter` for async code, or
            a limiter made from the environment.
        operation: a label for the ledger. Default: the route, such as ``POST /research/{topic}`` or
            ``WEBSOCKET /live``.
        ttl, on_expiry, on_error: as for ``limiter.hold(...)``.

    Raises:
        InvalidArgument: an argument is invalid.
        UnknownBudget: the given limiter has no such budget.
    """
    check_limiter_source(limiter, ["request"])
    check_hold_arguments(
        budget, estimate, limiter, ttl=ttl, on_expiry=on_expiry, on_error=on_error, operation=operation
    )

    async def held(connection: HTTPConnection) -> AsyncIterator[Any]:
        chosen = _limiter_of(limiter, connection)
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
            # The response was sent, so the failure can only be logged.
            logger.error("hold %s could not be settled: %s", hold.id, error)
        if disconnected is not None:
            raise disconnected

    return held


def _limiter_of(limiter: Limiter | Callable[[Any], Limiter] | None, connection: HTTPConnection) -> Limiter:
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
    """Reserve the estimate. Return the hold and the context manager that settles the hold."""
    if isinstance(limiter, AsyncBudgetLimiter):
        hold = await limiter.reserve(budget, estimate, **options)
        return hold, limiter.keep(hold, on_error=on_error)
    kept = limiter.hold(budget, estimate, on_error=on_error, **options)
    entering = asyncio.ensure_future(run_in_threadpool(kept.__enter__))
    try:
        held = await asyncio.shield(entering)
    except asyncio.CancelledError:
        entering.add_done_callback(partial(_release_late, kept))
        raise
    return held, _left_in_thread(kept, held)


def _release_late(kept: AbstractContextManager[Hold], entering: asyncio.Future[Hold]) -> None:
    """Release a hold that was granted after its request was cancelled."""
    if not entering.cancelled() and entering.exception() is None:
        error = asyncio.CancelledError()
        entering.get_loop().run_in_executor(None, kept.__exit__, type(error), error, None)


@asynccontextmanager
async def _left_in_thread(kept: AbstractContextManager[Hold], hold: Hold) -> AsyncIterator[None]:
    """Make a sync hold the current hold of this task. At the end of the block, settle the hold in a thread.

    The hold was reserved in a thread, which made it the current hold in the context of the thread only.
    """
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
    """The method and the pattern of the route. Unlike the path, the pattern has no values of the request."""
    path = getattr(connection.scope.get("route"), "path", "")
    return f"{connection.scope.get('method', 'WEBSOCKET')} {path}".strip()


def _refused(connection: HTTPConnection, error: BudgetError, limiter: Limiter) -> BudgetProblem:
    _handle_problems(connection)
    return BudgetProblem(problem_of(error, limiter.budgets))


def _handle_problems(connection: HTTPConnection) -> None:
    """Make the app reply with problem documents, unless the app has a handler for :class:`BudgetProblem`.

    Starlette keeps the handlers of an app in the scope of the request. If a later version does not, Starlette's handler
    for ``HTTPException`` still replies with the same status and headers.
    """
    handlers = connection.scope.get("starlette.exception_handlers")
    if handlers:
        handlers[0].setdefault(BudgetProblem, _reply)


async def _reply(connection: HTTPConnection, error: BudgetProblem) -> Response | None:
    if not isinstance(connection, WebSocket):
        return error.response()
    opening = connection.application_state is WebSocketState.CONNECTING
    if opening and "websocket.http.response" in (connection.scope.get("extensions") or {}):
        return error.response()  # instead of the handshake
    code = CLOSE_TRY_LATER if error.status_code == HTTPStatus.SERVICE_UNAVAILABLE else CLOSE_DENIED
    reason = error.problem.detail.encode()[:_CLOSE_REASON_BYTES_MAX].decode(errors="ignore")
    if WebSocketState.DISCONNECTED not in (connection.application_state, connection.client_state):
        with suppress(WebSocketDisconnect):  # the client may disconnect meanwhile
            await connection.close(code, reason)
    return None
