"""Limiters in memory, for tests of code that uses a limiter: no server, no file, no socket.

These limiters run the Lua scripts of the package in `fakeredis <https://fakeredis.readthedocs.io/>`_; install the extra
``ktrdr-budget[testing]``. Caps, idempotency and figures work as on a server. But a limiter in memory is only a
test double: it works in one process, stores nothing durably, and uses the time of this machine. The package itself is
tested on real servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ktrdr_budget.engine.transport.node import Node
from ktrdr_budget.engine.transport.store import Store
from ktrdr_budget.limiter import AsyncBudgetLimiter, LimiterBase
from ktrdr_budget.models import Budget
from ktrdr_budget.sync import BudgetLimiter

if TYPE_CHECKING:
    import fakeredis

__all__ = ["AsyncMemoryLimiter", "MemoryLimiter", "memory_server"]

TIMEOUT_S = 10.0
_URL = "redis://memory"


def memory_server() -> fakeredis.FakeServer:
    """Create a server in memory. Limiters that are given the same server share their budgets, as replicas do.

    While the server's attribute ``connected`` is false, each call fails as in an outage of the store.

    Raises:
        ImportError: fakeredis, or its Lua interpreter, is not installed.
    """
    try:
        import fakeredis
        import lupa  # noqa: F401  # without it, fakeredis only lacks EVAL
    except ImportError as error:
        raise ImportError(f"{error}: limiters in memory need the extra ktrdr-budget[testing]") from None
    return fakeredis.FakeServer(server_type="valkey")


class _MemoryNode(Node):
    """A server in memory: a client of fakeredis, without connections."""

    def __init__(self, server: fakeredis.FakeServer) -> None:
        from fakeredis import FakeAsyncRedis

        super().__init__(_URL)
        self.client = FakeAsyncRedis(server=server, protocol=2)

    async def connection(self) -> None:
        """Do nothing, because the client needs no connection; see :class:`Node`."""

    async def execute(
        self, words: Sequence[Any], asking: bool, deadline: float, on_resend: Callable[[], None] | None
    ) -> Any:
        """Execute a command once, as a second attempt would not be faster; see :class:`Node`."""
        if words[0] == "INFO":  # fakeredis lacks it; the readiness check reads the policy, and nothing is evicted here
            return b"maxmemory_policy:noeviction"
        return await self.client.execute_command(*words)


class _MemoryStore(Store):
    """A store on a server in memory."""

    def __init__(self, server: fakeredis.FakeServer) -> None:
        super().__init__(_URL)
        self._server = server

    @property
    def shown(self) -> str:
        """See :class:`Store`."""
        return "memory"

    async def open(self) -> None:
        """See :class:`Store`."""
        if self.node is None:
            self._use(_MemoryNode(self._server))


class _MemoryLimiter(LimiterBase):
    def __init__(
        self,
        budgets: Iterable[Budget] = (),
        *,
        server: fakeredis.FakeServer | None = None,
        timeout: float = TIMEOUT_S,
        **options: Any,
    ) -> None:
        """Create a limiter in memory.

        Args:
            server: the result of :func:`memory_server`. By default, the limiter has a server of its own, which starts
                empty.
            timeout: the deadline of each call, in seconds. The default is long, because a busy machine must
                not look like an outage.
            options: the other options of a limiter on a server.
        """
        made = memory_server() if server is None else server
        self._new_store = lambda *_: _MemoryStore(made)
        super().__init__(None, budgets, timeout=timeout, **options)


class AsyncMemoryLimiter(_MemoryLimiter, AsyncBudgetLimiter):
    """An :class:`~ktrdr_budget.AsyncBudgetLimiter` in memory: ``async with AsyncMemoryLimiter([...]) as limiter``."""


class MemoryLimiter(_MemoryLimiter, BudgetLimiter):
    """A :class:`~ktrdr_budget.BudgetLimiter` in memory: ``with MemoryLimiter([...]) as limiter``."""
