"""Connections that carry batches: one request and one reply at a time, without the overhead of a client.

redis-py opens each connection (name resolution, TLS, authentication, database). Then this module takes over the stream
of the connection, because a round trip by redis-py's client would cost as much time as the rest of a call.

A connection can be dead without a sign: a NAT or a firewall that has dropped its state discards packets silently.
Therefore a connection that was idle for longer than ``IDLE_MAX_S`` is replaced before its next request. If the share
``HEDGE_SHARE`` of the time until a request's deadline passes without a reply, the request is sent a second time, on a
new connection (:mod:`.node`). Idempotency keys make the second attempt safe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

__all__ = ["HEDGE_SHARE", "IDLE_MAX_S", "Connection", "ConnectionPool", "ReplyError"]

IDLE_MAX_S = 2.0
"""A connection that was idle for longer than this is not used again. An idle replica sends a probe each second, so that
one connection is always ready for the next call."""
HEDGE_SHARE = 0.25
"""If this share of the time until a request's deadline passes without a reply, the request is also sent on a second
connection."""


class ReplyError(Exception):
    """An error reply of the store. The message is the text of the reply, without ``ERR``."""


class ConnectionPool:
    """The connections to one server. Another connection is opened only if no connection is idle.

    Args:
        on_close: called whenever a connection has been closed, except by :meth:`Connection.discard`.
    """

    def __init__(self, on_close: Callable[[], None] | None = None) -> None:
        self.opened: set[Connection] = set()
        """All connections that have not been closed."""
        self.idle: list[Connection] = []
        """Connections without a request; the most recently used connection is the last."""
        self.on_close = on_close
        self.on_silent: Callable[[Connection], None] | None = None
        """Called if :data:`HEDGE_SHARE` of a request's time passes without a reply. The argument is the connection."""
        self._draining = False

    def check_out(self) -> Connection | None:
        """Take an idle connection that was used recently; ``None`` if there is none."""
        while self.idle:
            connection = self.idle.pop()
            if connection.idle_s > IDLE_MAX_S:
                connection.discard()
                self.discard_idle()
            elif connection.is_open:
                return connection
        return None

    def put_back(self, connection: Connection) -> None:
        """Make a connection available for the next request."""
        if self._draining:
            connection.abort()
        else:
            self.idle.append(connection)

    def discard_idle(self) -> None:
        """Close all idle connections."""
        while self.idle:
            self.idle.pop().discard()

    async def connect(self, client: Any) -> Connection | None:
        """Open a connection with the options of redis-py's client.

        Return ``None`` if requests must go through the client itself, because hiredis is not installed, or because an
        instrumentation (such as OpenTelemetry's) wraps the client's method.

        Raises:
            OSError, redis.RedisError: the server cannot be reached, or refuses this user.
        """
        from ktrdr_budget.engine.transport.resp import Reader, pack

        if Reader is None or hasattr(client.execute_command, "__wrapped__"):
            return None
        connection = client.connection_pool.make_connection()
        try:
            await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return Connection(self, connection.detach(), Reader(), pack)

    def drain(self) -> None:
        """Accept no more requests. Close idle connections now, and each other connection after its reply."""
        self._draining, self.on_close = True, None
        while self.idle:
            self.idle.pop().abort()

    def in_flight(self) -> dict[Connection, object]:
        """The connections that await a reply, each with the token of its request."""
        return {connection: connection.pending for connection in self.opened if connection.pending is not None}

    def abort(self) -> None:
        """Close all connections now; pending requests fail with ``ConnectionResetError``."""
        self.drain()
        for connection in list(self.opened):
            connection.abort()

    async def close(self) -> None:
        """Close all connections, and return when they are closed."""
        opened = list(self.opened)
        self.abort()
        for connection in opened:
            await connection.closed


class Connection(asyncio.Protocol):
    """One connection, which carries one request at a time. If a request gets no reply, the connection is closed.

    Args:
        pool: the pool of the connection.
        writer: the writer of an open stream, which only this object may use from now on.
        replies: a parser of hiredis.
        pack: converts a command to bytes.
    """

    def __init__(
        self, pool: ConnectionPool, writer: asyncio.StreamWriter, replies: Any, pack: Callable[[tuple[Any, ...]], bytes]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool = pool
        self._writer = writer  # kept, for it closes the transport when it is collected
        self._transport = writer.transport
        self._replies = replies
        self._pack = pack
        self._on_reply: Callable[[Any], None] | None = None
        self._checked_out = False
        self._discarded = False
        self.words: tuple[str | int, ...] = ()
        """The current request, or the last one."""
        self.on_resend: Callable[[], None] | None = None
        """Called before the current request is also sent on another connection. If ``None``, it is sent only once."""
        self.deadline = 0.0
        """The deadline of the current request, in the event loop's time."""
        self.last_used_s = self._loop.time()
        """When the last request was sent, in the event loop's time."""
        self._wake_s = 0.0
        self._timer: asyncio.Handle | None = None
        self._timer_s = 0.0
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """A future that completes when the connection is closed."""
        pool.opened.add(self)
        self._transport.set_protocol(self)

    @property
    def is_open(self) -> bool:
        """Whether the connection is open, as far as the event loop has noticed."""
        return not self._transport.is_closing()

    @property
    def is_encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self._transport.get_extra_info("cipher") is not None

    @property
    def idle_s(self) -> float:
        """Seconds since the last request was sent."""
        return self._loop.time() - self.last_used_s

    @property
    def pending(self) -> object | None:
        """A token that identifies the pending request; ``None`` if no request is pending."""
        return self._on_reply

    def send(
        self,
        words: tuple[str | int, ...],
        deadline: float,
        on_reply: Callable[[Any], None],
        on_resend: Callable[[], None] | None = None,
    ) -> None:
        """Send a command.

        Args:
            deadline: when the wait for the reply ends, in the event loop's time.
            on_reply: called once, with the reply or with an exception: :class:`ReplyError`, ``TimeoutError``, or
                ``ConnectionResetError`` if the connection was closed.
            on_resend: called before the command is also sent on another connection; if ``None``, it is sent once only.
        """
        assert self._on_reply is None
        packed = self._pack(words)
        self._on_reply = on_reply
        self.words = words
        self.on_resend = on_resend
        self.deadline = self._wake_s = deadline
        self.last_used_s = now_s = self._loop.time()
        if on_resend is not None:
            self._wake_s = now_s + (deadline - now_s) * HEDGE_SHARE
        if self._timer is None or self._timer_s > self._wake_s:
            self._set_timer()
        self._transport.write(packed)

    async def execute(
        self, words: tuple[str | int, ...], deadline: float, on_resend: Callable[[], None] | None = None
    ) -> Any:
        """Send a command and return its reply. The connection stays checked out until :meth:`release`.

        Raises:
            ReplyError, TimeoutError, ConnectionResetError: see :meth:`send`.
        """
        self._checked_out = True
        received: asyncio.Future[Any] = self._loop.create_future()
        self.send(words, deadline, lambda reply: None if received.done() else received.set_result(reply), on_resend)
        try:
            reply = await received
        except BaseException:
            self.abort()  # a reply that arrives later would be taken for the reply to the next request
            raise
        if isinstance(reply, Exception):
            raise reply
        return reply

    def release(self) -> None:
        """Return the connection to its pool, if it is open."""
        self._checked_out = False
        if self.is_open:
            self._pool.put_back(self)

    def supersede(self, reply: Any) -> None:
        """Complete the request with a reply from another connection. Close this connection, which stayed silent."""
        on_reply, self._on_reply = self._on_reply, None
        self.discard()
        if on_reply is not None:
            on_reply(reply)

    def discard(self) -> None:
        """Close the connection. Do not call the pool's ``on_close``, because the server need not be at fault."""
        self._discarded = True
        self.abort()

    def abort(self) -> None:
        """Close the connection now; unsent data is dropped."""
        self._transport.abort()

    def _complete(self, reply: Any) -> None:
        on_reply, self._on_reply = self._on_reply, None
        if on_reply is not None:  # else the server sent data without a request
            on_reply(reply)

    # -- the deadline --------------------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        """Set the connection's only timer. A timer for each request would cost as much as sending the request."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = self._wake_s
        self._timer = self._loop.call_at(self._timer_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._on_reply is None:
            return
        if self._loop.time() < self._wake_s:
            self._set_timer()
        elif self._wake_s < self.deadline:
            self._wake_s = self.deadline
            self._set_timer()
            if self._pool.on_silent is not None:
                self._pool.on_silent(self)
        else:
            self.abort()
            self._complete(TimeoutError())

    # -- called by the event loop --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Feed a part of a reply to the parser; complete the request once the reply is whole."""
        self._replies.feed(data)
        reply = self._replies.gets()
        if reply is False:
            return
        if isinstance(reply, Exception):
            reply = ReplyError(str(reply).removeprefix("ERR "))
        if self._on_reply is not None and not self._checked_out:
            self._pool.put_back(self)
        self._complete(reply)

    def connection_lost(self, error: Exception | None) -> None:
        """Handle the end of the connection, which either side has closed."""
        if self._timer is not None:
            self._timer.cancel()
        self._pool.opened.discard(self)
        if not self.closed.done():
            self.closed.set_result(None)
        if self._pool.on_close is not None and not self._discarded:
            self._pool.on_close()
        self._complete(ConnectionResetError("the connection was closed"))
