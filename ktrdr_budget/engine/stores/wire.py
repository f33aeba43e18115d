"""Connections for batches: one request, one reply, and nothing in between that a batch does not need.

redis-py makes each connection (addresses, TLS, authentication, database); then it is taken over. Its client would spend
as much time on a round trip as everything else together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

__all__ = ["Refusal", "Wire", "Wires"]


class Refusal(Exception):
    """The store's answer is an error; its words are the message."""


class Wires:
    """The connections of one server: as many as there were batches under way at once.

    Args:
        on_end: told whenever one of them has ended, whoever wanted it.
    """

    def __init__(self, on_end: Callable[[], None] | None = None) -> None:
        self.standing: set[Wire] = set()
        self.idle: list[Wire] = []
        self.on_end = on_end

    def ready(self) -> Wire | None:
        """A connection that carries nothing."""
        while self.idle:
            wire = self.idle.pop()
            if wire.stands:
                return wire
        return None

    async def connect(self, client: Any) -> Wire | None:
        """Another connection, made as redis-py's client makes its own.

        ``None`` if the client must be asked instead: without hiredis, and while somebody watches it (an
        instrumentation such as OpenTelemetry's wraps its method).

        Raises:
            OSError, redis.RedisError: the store cannot be reached, or refuses this user.
        """
        from ktrdr_budget.engine.stores.packing import Reader, pack

        if Reader is None or hasattr(client.execute_command, "__wrapped__"):
            return None
        connection = client.connection_pool.make_connection()
        try:
            await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return Wire(self, connection.hand_over(), Reader(), pack)

    def retire(self) -> None:
        """No more requests: idle connections end now, the others with the answer that they wait for."""
        idle, self.idle, self.on_end = self.idle, _Leaving(), None
        for wire in idle:
            wire.abort()

    def under_way(self) -> dict[Wire, object]:
        """The connections that wait for an answer, each with a mark of the request that it carries."""
        return {wire: wire.request for wire in self.standing if wire.request is not None}

    def abort(self) -> None:
        """Ends all of them; who waits for an answer is told so."""
        self.retire()
        for wire in list(self.standing):
            wire.abort()

    async def close(self) -> None:
        """Ends all of them, and returns when they have ended."""
        standing = list(self.standing)
        self.abort()
        for wire in standing:
            await wire.ended


class _Leaving(list["Wire"]):
    """Where the connections of a server that was left wait for their next request: nowhere."""

    def append(self, wire: Wire) -> None:
        """Takes one back, and ends it."""
        wire.abort()


class Wire(asyncio.Protocol):
    """One connection. It carries one request at a time, and ends if a request gets no answer.

    Args:
        home: where it waits for its next request.
        writer: the stream's; nobody else uses the stream any more.
        replies: hiredis' parser.
        pack: puts a command into bytes.
    """

    def __init__(
        self, home: Wires, writer: asyncio.StreamWriter, replies: Any, pack: Callable[[tuple[Any, ...]], bytes]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._home = home
        self._writer = writer  # kept, for it closes the transport when it is collected
        self._transport = writer.transport
        self._replies = replies
        self._pack = pack
        self._told: Callable[[Any], None] | None = None
        self._lent = False
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the connection has ended."""
        home.standing.add(self)
        self._transport.set_protocol(self)

    @property
    def stands(self) -> bool:
        """Whether the connection has not ended, as far as is known."""
        return not self._transport.is_closing()

    @property
    def request(self) -> object | None:
        """A mark of the request whose answer is waited for; ``None`` if there is none."""
        return self._told

    def send(self, words: tuple[str | int, ...], deadline: float, told: Callable[[Any], None]) -> None:
        """Sends one command.

        Args:
            deadline: the time of the event loop until which an answer is waited for.
            told: is called once, with the answer or with an exception: :class:`Refusal`, ``TimeoutError``, or
                ``ConnectionResetError`` if the connection has ended.
        """
        assert self._told is None
        packed = self._pack(words)
        self._told = told
        self._deadline = deadline
        if self._timer is None or self._timer.when() > deadline:
            self._watch()
        self._transport.write(packed)

    async def ask(self, words: tuple[str | int, ...], deadline: float) -> Any:
        """Sends one command and waits for its answer; raises what :meth:`send` tells. Then :meth:`give_back`."""
        self._lent = True
        reply: asyncio.Future[Any] = self._loop.create_future()
        self.send(words, deadline, lambda answer: None if reply.done() else reply.set_result(answer))
        try:
            answer = await reply
        except BaseException:
            self.abort()  # an answer that comes now would be taken for that of the next request
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    def give_back(self) -> None:
        """Lets others use the connection again, if it stands."""
        self._lent = False
        if self.stands:
            self._home.idle.append(self)

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
        self._timer = self._loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._told is None:
            return
        if self._loop.time() < self._deadline:
            self._watch()
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
            answer = Refusal(str(answer).removeprefix("ERR "))
        if self._told is not None and not self._lent:
            self._home.idle.append(self)
        self._tell(answer)

    def connection_lost(self, error: Exception | None) -> None:
        """The end, whoever wanted it."""
        if self._timer is not None:
            self._timer.cancel()
        self._home.standing.discard(self)
        if not self.ended.done():
            self.ended.set_result(None)
        if self._home.on_end is not None:
            self._home.on_end()
        self._tell(ConnectionResetError("the connection has ended"))
