"""What of a streamed answer has arrived on this machine and was not read yet.

A caller who reads slowly and then stops has not read all that was made for him, and is billed for all of it. So, before
such a stream is settled, what waits in the buffers is read on; for that, and to see whether there is anything, a guard
listens where the HTTP client reads from the network.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

__all__ = ["DRAIN_IDLE_S", "DRAIN_S", "AsyncWire", "Drain", "SyncWire", "Wire"]

DRAIN_S = 0.06
"""How long what has arrived may take to be read."""
DRAIN_IDLE_S = 0.03
"""After so long a silence nothing more had been on its way: longer than a provider's nearest server is away."""
DRAIN_BYTES_MAX = 1024 * 1024
_SMALL_BYTES = 16 * 1024
"""So little leaves room in the smallest receive buffer (of 128 KiB, with what the kernel counts for each packet): the
sender was not held up, so nothing follows that was made long ago."""
_FRAME_BYTES = 16
"""What HTTP puts around a chunk, at most."""


class Drain:
    """Bounds of reading on.

    Args:
        idle_s: silence that ends it.
    """

    def __init__(self, total_s: float = DRAIN_S, idle_s: float = DRAIN_IDLE_S) -> None:
        self._ends_s = time.monotonic() + total_s
        self._idle_s = idle_s
        self._read_bytes = 0
        self.caught_up = False
        """All that had arrived was heard."""

    @property
    def over(self) -> bool:
        """Whether a bound is reached."""
        return self._read_bytes > DRAIN_BYTES_MAX or time.monotonic() >= self._ends_s

    def wait_s(self, peek_s: float | None) -> float:
        """How long the network may be waited for now; ``peek_s``: if nothing is there, and nothing is known to come."""
        return self._idle_s if peek_s is None or self._read_bytes > _SMALL_BYTES else peek_s

    def left_s(self) -> float:
        """Until the end."""
        return max(0.0, self._ends_s - time.monotonic())

    def read(self, data: bytes) -> None:
        """Counts what was read."""
        self._read_bytes += len(data)


class Wire:
    """One HTTP/1 connection, as long as it carries one answer.

    Args:
        stream: of httpcore, where the HTTP client reads.
    """

    _peek_s: float
    """What takes all that is there, and waits for nothing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._unread = stream.read
        self._mine: Any = self.read  # type: ignore[attr-defined]
        self._buffered: int | None = None
        """Of what was read last and is not heard, with its frames; ``None`` if that is not known."""
        self.drain: Drain | None = None
        """Set while what has arrived is read on."""
        self.patient = False
        """It is read on for something that is known to come."""
        self.waiting = False
        """Somebody is reading."""
        self.lost = False
        """Reading failed, and something had arrived."""
        self.interrupted: BaseException | None = None
        """What is to be raised as soon as what came with it is heard."""
        stream.read = self._mine

    @classmethod
    def tap(cls, response: Any) -> Any:
        """The wire of an answer; ``None`` if it cannot be listened to, or carries other answers, too."""
        extensions = response.extensions
        stream = extensions.get("network_stream")
        if extensions.get("http_version") not in (b"HTTP/1.1", b"HTTP/1.0") or not hasattr(stream, "__dict__"):
            return None
        vars(stream).pop("read", None)  # that of an answer before this one
        return cls(stream)

    def let_go(self) -> None:
        """Listens no more."""
        if vars(self._stream).get("read") is self._mine:
            del self._stream.read

    def heard(self, chunk: bytes) -> None:
        """A chunk was handed on."""
        if self._buffered is not None:
            self._buffered -= len(chunk) + _FRAME_BYTES

    @property
    def all_heard(self) -> bool:
        """Whether all that has arrived was handed on; false also if that cannot be told."""
        if self.waiting:
            return not self.readable
        if self._buffered is None or self._buffered > _FRAME_BYTES:
            return False
        return not self.readable and not self._undeciphered()

    @property
    def readable(self) -> bool:
        """Whether something is in the system's buffer, or the connection is closed."""
        return bool(self._stream.get_extra_info("is_readable") in (True, None))

    def _undeciphered(self) -> int:
        """Bytes that a TLS stream of anyio has taken and not deciphered."""
        if self._stream.get_extra_info("ssl_object") is None:
            return 0
        if isinstance(self, SyncWire):  # what a socket of TLS has not deciphered, it has not taken
            return getattr(getattr(self._stream, "_incoming", None), "pending", 0)
        layer: Any = getattr(self._stream, "_stream", None)
        buffers = []
        while hasattr(layer, "_read_bio"):
            buffers.append(layer._read_bio.pending)
            layer = getattr(layer, "transport_stream", None)
        return sum(buffers) if buffers else 1  # who knows

    def _took(self, data: bytes, max_bytes: int) -> bytes:
        # What is full may be a part: the rest waits where it cannot be seen.
        self._buffered = None if len(data) >= max_bytes else len(data)
        if self.drain is not None:
            self.drain.read(data)
        return data

    def _limit(self, drain: Drain) -> tuple[float, bool]:
        """How long to wait, and whether silence for so long means that all was heard."""
        wait_s = drain.wait_s(None if self.patient or self.readable else self._peek_s)
        left_s = drain.left_s()
        if drain.over:
            raise _Over
        return min(wait_s, left_s), wait_s <= left_s


class _Over(Exception):
    """A bound of a drain is reached."""


class AsyncWire(Wire):
    """Of an ``AsyncClient``."""

    _peek_s = 0.0001  # two turns of the event loop: one to read, one to hand over

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Reads from the network, in place of the stream's own method."""
        if self.interrupted is not None:
            raise self.interrupted
        if self.drain is not None:
            return await self._read_on(self.drain, max_bytes)
        self.waiting = True
        try:
            data = await self._unread(max_bytes, timeout)
        except BaseException as error:
            data = await self._came_with(error, max_bytes)
        finally:
            self.waiting = False
        return self._took(data, max_bytes)

    async def _read_on(self, drain: Drain, max_bytes: int) -> bytes:
        wait_s, decides = self._limit(drain)
        try:
            return self._took(await self._unread(max_bytes, wait_s), max_bytes)
        except Exception:  # a timeout, or the end of the connection
            drain.caught_up = decides
            raise

    async def _came_with(self, error: BaseException, max_bytes: int) -> bytes:
        """What arrived in the same moment as a cancellation or a timeout; raises the error if there is nothing."""
        self.lost = True  # unless the following ends
        with _shielded():
            try:
                data: bytes = await self._unread(max_bytes, self._peek_s)
            except Exception:
                data = b""
        self.lost = False
        if not data:
            raise error
        self.interrupted = error
        return data


class SyncWire(Wire):
    """Of a ``Client``."""

    _peek_s = 0.0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Reads from the network, in place of the stream's own method."""
        if self.drain is not None:
            return self._read_on(self.drain, max_bytes)
        self.waiting = True
        try:
            return self._took(self._unread(max_bytes, timeout), max_bytes)
        except BaseException:
            self.lost = self.readable
            raise
        finally:
            self.waiting = False

    def _read_on(self, drain: Drain, max_bytes: int) -> bytes:
        wait_s, decides = self._limit(drain)
        try:
            return self._took(self._unread(max_bytes, wait_s), max_bytes)
        except Exception:
            drain.caught_up = decides
            raise


def _shielded() -> AbstractContextManager[Any]:
    """Keeps cancellations of anyio, which repeat themselves, out of a block."""
    anyio = sys.modules.get("anyio")
    return nullcontext() if anyio is None else anyio.CancelScope(shield=True)
