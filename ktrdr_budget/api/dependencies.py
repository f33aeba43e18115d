"""A budget for a route of any FastAPI app: ``Depends(hold_budget("agent", estimate="0.15"))``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ktrdr_budget.api.problems import Problem, problem_of
from ktrdr_budget.engine.holds import OnError, check_on_error, current_hold, restore_hold
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
from ktrdr_budget.models import TTL_DEFAULT_S, OnExpiry, check_ttl_ms
from ktrdr_budget.money import AmountIn
from ktrdr_budget.sync import BudgetLimiter, Hold

__all__ = ["BudgetProblem", "hold_budget"]

logger = logging.getLogger("ktrdr_budget")

_LABEL_CHARACTERS_MAX = 256
Limiter = AsyncBudgetLimiter | BudgetLimiter
_REFUSALS = (BudgetExceeded, TooManyHolds, TooManyBudgets, StoreUnavailable)


class BudgetProblem(HTTPException):
    """A route has no room in its budget (429), or the budget cannot be asked (503).

    It is answered as ``application/problem+json``. An app may handle it otherwise, as any exception.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.status, detail=str(problem), headers=dict(problem.headers) or None)
        self.problem = problem

    def response(self) -> Response:
        """The answer."""
        return self.problem.response()


def hold_budget(
    budget: str | Mapping[str, AmountIn],
    estimate: AmountIn | None = None,
    *,
    limiter: Limiter | Callable[[Request], Limiter] | None = None,
    ttl: float = TTL_DEFAULT_S,
    on_expiry: OnExpiry = "charge",
    on_error: OnError = "release",
    operation: str | None = None,
) -> Callable[[Request], AsyncIterator[Any]]:
    """A dependency that holds an estimate while a route answers, and hands it the hold.

    Without room the route does not run: the answer is 429, as a problem document, and so it is if a call inside is
    denied; 503 if the store does not answer. A route that answers, whatever the
    status, commits what was accrued (by metered or guarded calls, or ``hold.accrue``), or else the estimate. A route
    that raises commits what was accrued, or releases. Both happen after the answer has been sent, streams included,
    unless FastAPI is told otherwise with ``Depends(..., scope="function")``.

    Args:
        budget: a name with ``estimate``, or a mapping of names to estimates.
        limiter: an :class:`AsyncBudgetLimiter` of the app's event loop, for routes of ``async def``; a
            :class:`BudgetLimiter` for those of ``def``, so that a guarded sync client inside draws from the hold, which
            then is a :class:`~ktrdr_budget.sync.Hold`; or a function of the request that returns one. By default what
            :func:`~ktrdr_budget.metering.decorators.set_default_limiter` was given for async code, or one made from the
            environment.
        operation: a label for the ledger; by default the route, such as ``POST /research/{topic}``.
        ttl, on_expiry, on_error: as for ``limiter.hold(...)``.

    Raises:
        InvalidArgument: an argument is not usable.
    """
    check_ttl_ms(ttl)
    check_on_error(on_error)
    if limiter is not None and not isinstance(limiter, Limiter) and not callable(limiter):
        raise InvalidArgument(
            f"the limiter of a route must be an AsyncBudgetLimiter or a BudgetLimiter, not {limiter!r}"
        )

    async def held(request: Request) -> AsyncIterator[Any]:
        chosen = limiter(request) if callable(limiter) else limiter or default_async_limiter()
        label = _route(request) if operation is None else operation
        options = {"ttl": ttl, "on_expiry": on_expiry, "operation": label[:_LABEL_CHARACTERS_MAX]}
        try:
            hold, kept = await _reserved(chosen, budget, estimate, on_error, options)
        except _REFUSALS as error:
            raise _refused(request, error, chosen) from error
        failed: BaseException | None = None
        try:
            async with kept:
                try:
                    yield hold
                except BaseException as error:
                    failed = error
                    raise
        except BudgetError as error:
            if error is failed:
                if isinstance(error, _REFUSALS):
                    raise _refused(request, error, chosen) from error
                raise
            # The route has answered, and perhaps it was paid for: that is not taken back.
            logger.error("hold %s could not be settled: %s", hold.id, error)

    return held


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


def _route(request: Request) -> str:
    """The route's pattern, which unlike the path holds nothing of its caller."""
    path = getattr(request.scope.get("route"), "path", "")
    return f"{request.method} {path}".strip()


def _refused(request: Request, error: BudgetError, limiter: Limiter) -> BudgetProblem:
    _handle_problems(request)
    return BudgetProblem(problem_of(error, limiter.budgets))


def _handle_problems(request: Request) -> None:
    """Makes the app answer with problem documents, if it does not handle them itself.

    Starlette keeps the handlers that are in force in the request's scope. Should that change, its handler for any
    ``HTTPException`` still answers with the right status and headers.
    """
    handlers = request.scope.get("starlette.exception_handlers")
    if handlers:
        handlers[0].setdefault(BudgetProblem, _answer)


async def _answer(request: Request, error: BudgetProblem) -> Response:
    return error.response()
