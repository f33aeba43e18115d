"""Connections for batches: one request, one reply, and nothing in between that a batch does not need.

redis-py makes each connection (addresses, TLS, authentication, database); then it is taken over. Its client would spend
as much time on a round trip as everything else together.

A connection can be dead without a sign: a NAT or firewall that forgot it drops its packets in silence. Therefore one
that was idle for longer than ``TRUSTED_IDLE_S`` is replaced before its next request, and a request without a reply
after ``PATIENCE`` of its time is sent a second time, on a new connection (:mod:`.servers`). Idempotency keys make that
safe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

__all__ = ["PATIENCE", "TRUSTED_IDLE_S", "ReplyError", "Connection", "ConnectionPool"]

TRUSTED_IDLE_S = 2.0
"""An idle connection of this age is not used again. The pulse of an idle replica, each second, keeps one connection
younger (:mod:`ktrdr_budget.engine.batching.loss_repair`), so that a lone call finds a connection ready."""
PATIENCE = 0.25
"""The share of a request's time after which it is sent on a second connection, too."""


class ReplyError(Exception):
    """The store's answer is an error; its words are the message."""


class ConnectionPool:
    """The connections of one server: as many as there were batches under way at once.

    Args:
        on_end: told whenever one of them has ended, whoever wanted it.
    """

    def __init__(self, on_end: Callable[[], None] | None = None) -> None:
        self.opened: set[Connection] = set()
        self.idle: list[Connection] = []
        self.on_end = on_end
        self.on_late: Callable[[Connection], None] | None = None
        """Called with a connection whose request has waited for :data:`PATIENCE` of its time."""

    def ready(self) -> Connection | None:
        """A connection that carries nothing, and was in use lately."""
        while self.idle:
            wire = self.idle.pop()  # the one that was used last
            if wire.age_s > TRUSTED_IDLE_S:
                wire.drop()
                self.drop_idle()
            elif wire.is_open:
                return wire
        return None

    def drop_idle(self) -> None:
        """End all idle connections."""
        while self.idle:
            self.idle.pop().drop()

    async def connect(self, client: Any) -> Connection | None:
        """Another connection, made as redis-py's client makes its own.

        ``None`` if the client must be asked instead: without hiredis, and while somebody watches it (an
        instrumentation such as OpenTelemetry's wraps its method).

        Raises:
            OSError, redis.RedisError: the store cannot be reached, or refuses this user.
        """
        from ktrdr_budget.engine.transport.redis_pool import Reader, pack

        if Reader is None or hasattr(client.execute_command, "__wrapped__"):
            return None
        connection = client.connection_pool.make_connection()
        try:
            await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return Connection(self, connection.hand_over(), Reader(), pack)

    def retire(self) -> None:
        """No more requests: idle connections end now, the others with the answer that they wait for."""
        idle, self.idle, self.on_end = self.idle, _Leaving(), None
        for wire in idle:
            wire.abort()

    def in_flight(self) -> dict[Connection, object]:
        """The connections that wait for an answer, each with a mark of the request that it carries."""
        return {wire: wire.request for wire in self.opened if wire.request is not None}

    def abort(self) -> None:
        """Ends all of them; who waits for an answer is told so."""
        self.retire()
        for wire in list(self.opened):
            wire.abort()

    async def close(self) -> None:
        """Ends all of them, and returns when they have ended."""
        standing = list(self.opened)
        self.abort()
        for wire in standing:
            await wire.ended


class _Leaving(list["Connection"]):
    """Where the connections of a server that was left wait for their next request: nowhere."""

    def append(self, wire: Connection) -> None:
        """Takes one back, and ends it."""
        wire.abort()


class Connection(asyncio.Protocol):
    """One connection. It carries one request at a time, and ends if a request gets no answer.

    Args:
        home: where it waits for its next request.
        writer: the stream's; nobody else uses the stream any more.
        replies: hiredis' parser.
        pack: puts a command into bytes.
    """

    def __init__(
        self, home: ConnectionPool, writer: asyncio.StreamWriter, replies: Any, pack: Callable[[tuple[Any, ...]], bytes]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._home = home
        self._writer = writer  # kept, for it closes the transport when it is collected
        self._transport = writer.transport
        self._replies = replies
        self._pack = pack
        self._told: Callable[[Any], None] | None = None
        self._checked_out = False
        self._dropped = False
        self.words: tuple[str | int, ...] = ()
        """The request that the connection carries, or carried last."""
        self.resent: Callable[[], None] | None = None
        """To be called before that request is sent on another connection, too."""
        self.deadline = 0.0
        """The time of the event loop until which its reply is awaited."""
        self.used_s = self._loop.time()
        """When it was last in use, in time of the event loop: its last request was sent then."""
        self._wake_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the connection has ended."""
        home.opened.add(self)
        self._transport.set_protocol(self)

    @property
    def is_open(self) -> bool:
        """Whether the connection has not ended, as far as is known."""
        return not self._transport.is_closing()

    @property
    def age_s(self) -> float:
        """For how long the connection has not been used."""
        return self._loop.time() - self.used_s

    @property
    def request(self) -> object | None:
        """A mark of the request whose answer is waited for; ``None`` if there is none."""
        return self._told

    def send(
        self,
        words: tuple[str | int, ...],
        deadline: float,
        told: Callable[[Any], None],
        resent: Callable[[], None] | None = None,
    ) -> None:
        """Sends one command.

        Args:
            deadline: the time of the event loop until which an answer is waited for.
            told: is called once, with the answer or with an exception: :class:`ReplyError`, ``TimeoutError``, or
                ``ConnectionResetError`` if the connection has ended.
            resent: called before the command is sent on another connection, too; ``None`` forbids that.
        """
        assert self._told is None
        packed = self._pack(words)
        self._told = told
        self.words = words
        self.resent = resent
        self.deadline = self._wake_s = deadline
        self.used_s = now_s = self._loop.time()
        if resent is not None:
            self._wake_s = now_s + (deadline - now_s) * PATIENCE
        if self._timer is None or self._timer.when() > self._wake_s:
            self._watch()
        self._transport.write(packed)

    async def ask(self, words: tuple[str | int, ...], deadline: float, resent: Callable[[], None] | None = None) -> Any:
        """Sends one command and waits for its answer; raises what :meth:`send` tells. Then :meth:`give_back`."""
        self._checked_out = True
        reply: asyncio.Future[Any] = self._loop.create_future()
        self.send(words, deadline, lambda answer: None if reply.done() else reply.set_result(answer), resent)
        try:
            answer = await reply
        except BaseException:
            self.abort()  # an answer that comes now would be taken for that of the next request
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    def release(self) -> None:
        """Lets others use the connection again, if it stands."""
        self._checked_out = False
        if self.is_open:
            self._home.idle.append(self)

    def supersede(self, reply: Any) -> None:
        """Take this reply, of another connection, for the request; end this connection, which did not reply."""
        told, self._told = self._told, None
        self.drop()
        if told is not None:
            told(reply)

    def drop(self) -> None:
        """End the connection without a word to its home: the server is not in doubt."""
        self._dropped = True
        self.abort()

    def abort(self) -> None:
        """Ends the connection; what was not sent yet is dropped."""
        self._transport.abort()

    def _tell(self, answer: Any) -> None:
        told, self._told = self._told, None
        if told is not None:  # else a word that nobody asked for
            told(answer)

    # -- the deadline --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """One timer serves many requests: making one for each would cost as much as sending it."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._wake_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._told is None:
            return
        if self._loop.time() < self._wake_s:
            self._watch()
        elif self._wake_s < self.deadline:
            self._wake_s = self.deadline
            self._watch()
            if self._home.on_late is not None:
                self._home.on_late(self)
        else:
            self.abort()
            self._tell(TimeoutError())

    # -- called by the event loop --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """A part of an answer, or all of it."""
        self._replies.feed(data)
        answer = self._replies.gets()
        if answer is False:
            return
        if isinstance(answer, Exception):
            answer = ReplyError(str(answer).removeprefix("ERR "))
        if self._told is not None and not self._checked_out:
            self._home.idle.append(self)
        self._tell(answer)

    def connection_lost(self, error: Exception | None) -> None:
        """The end, whoever wanted it."""
        if self._timer is not None:
            self._timer.cancel()
        self._home.opened.discard(self)
        if not self.ended.done():
            self.ended.set_result(None)
        if self._home.on_end is not None and not self._dropped:
            self._home.on_end()
        self._tell(ConnectionResetError("the connection has ended"))
