"""Access to the part of a streamed response that has arrived on this machine but was not read yet.

A caller that reads slowly and then stops has not read all output that the provider produced and bills. Before such a
stream is settled, the guard therefore reads the data that waits in the buffers. A network tap makes this possible: it
replaces the function by which the HTTP client reads from the network.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

__all__ = ["DRAIN_BYTES_MAX", "DRAIN_IDLE_S", "DRAIN_S", "AsyncNetworkTap", "Drain", "NetworkTap", "SyncNetworkTap"]

DRAIN_S = 0.06
"""Time limit of a drain. To drain is to read the data that has already arrived."""
DRAIN_IDLE_S = 0.03
"""If no data arrives for this long, none was in transit: data from a provider's nearest server arrives sooner."""
DRAIN_BYTES_MAX = 1024 * 1024
_SMALL_BYTES = 16 * 1024
"""The smallest receive buffer (128 KiB, including the kernel's overhead per packet) holds more bytes than this. If a
drain finds no more bytes than this, the sender was not blocked, and no older data can follow."""
_FRAME_BYTES = 16
"""Upper bound of the bytes that HTTP adds to each piece of the body (in chunked transfer)."""


class Drain:
    """The limits of one drain.

    Args:
        total_s: the time limit, in seconds.
        idle_s: the seconds without data after which the drain ends.
    """

    def __init__(self, total_s: float = DRAIN_S, idle_s: float = DRAIN_IDLE_S) -> None:
        self._deadline_s = time.monotonic() + total_s
        self._idle_s = idle_s
        self._read_bytes = 0
        self.caught_up = False
        """Whether all data that had arrived was read."""

    @property
    def exhausted(self) -> bool:
        """Whether a limit is reached."""
        return self._read_bytes > DRAIN_BYTES_MAX or time.monotonic() >= self._deadline_s

    def wait_s(self, peek_s: float | None) -> float:
        """Return the seconds that the next read may wait for data.

        Args:
            peek_s: the seconds to wait. If ``None``, more data is readable or expected, and the drain's ``idle_s``
                applies.
        """
        return self._idle_s if peek_s is None or self._read_bytes > _SMALL_BYTES else peek_s

    def left_s(self) -> float:
        """Seconds until the time limit."""
        return max(0.0, self._deadline_s - time.monotonic())

    def count(self, data: bytes) -> None:
        """Count data that was read."""
        self._read_bytes += len(data)


class NetworkTap:
    """Taps one HTTP/1 connection while it carries one response.

    Args:
        stream: the httpcore stream from which the HTTP client reads.
    """

    _peek_s: float
    """The timeout, in seconds, of a read that returns only data that has already arrived."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._original_read = stream.read
        self._tapped_read: Any = self.read  # type: ignore[attr-defined]
        self._unparsed_bytes: int | None = None
        """Bytes of the latest read that are not parsed yet, including HTTP frames; ``None`` if unknown."""
        self.drain: Drain | None = None
        """The limits of the drain in progress; ``None`` if there is none."""
        self.expects_data = False
        """Whether more data is known to follow, so that the drain waits for that data."""
        self.is_reading = False
        """Whether a read is in progress."""
        self.data_lost = False
        """Whether a read failed although data had arrived."""
        self.deferred_error: BaseException | None = None
        """An error to raise once the data that arrived together with it is parsed."""
        stream.read = self._tapped_read

    @classmethod
    def attach(cls, response: Any) -> Any:
        """Tap the connection of a response; return the tap.

        Return ``None`` if the connection cannot be tapped, or if it carries other responses too (HTTP/2).
        """
        extensions = response.extensions
        stream = extensions.get("network_stream")
        if extensions.get("http_version") not in (b"HTTP/1.1", b"HTTP/1.0") or not hasattr(stream, "__dict__"):
            return None
        vars(stream).pop("read", None)  # the tap of an earlier response
        return cls(stream)

    def detach(self) -> None:
        """Restore the original read function."""
        if vars(self._stream).get("read") is self._tapped_read:
            del self._stream.read

    def mark_parsed(self, chunk: bytes) -> None:
        """Count a chunk as parsed, because the parser has received it."""
        if self._unparsed_bytes is not None:
            self._unparsed_bytes -= len(chunk) + _FRAME_BYTES

    @property
    def all_parsed(self) -> bool:
        """Whether the parser received all data that has arrived; false if that is unknown."""
        if self.is_reading:
            return not self.readable
        if self._unparsed_bytes is None or self._unparsed_bytes > _FRAME_BYTES:
            return False
        return not self.readable and not self._encrypted_bytes()

    @property
    def readable(self) -> bool:
        """Whether the system's receive buffer has data, or the connection is closed."""
        return bool(self._stream.get_extra_info("is_readable") in (True, None))

    def _encrypted_bytes(self) -> int:
        """Bytes that a TLS stream has received but not decrypted."""
        if self._stream.get_extra_info("ssl_object") is None:
            return 0
        if isinstance(self, SyncNetworkTap):  # a sync TLS socket leaves encrypted data in the system's buffer
            return getattr(getattr(self._stream, "_incoming", None), "pending", 0)
        layer: Any = getattr(self._stream, "_stream", None)
        buffers = []
        while hasattr(layer, "_read_bio"):
            buffers.append(layer._read_bio.pending)
            layer = getattr(layer, "transport_stream", None)
        return sum(buffers) if buffers else 1  # unknown, so assume some

    def _received(self, data: bytes, max_bytes: int) -> bytes:
        # A full read may be a part of the available data; the size of the rest is unknown.
        self._unparsed_bytes = None if len(data) >= max_bytes else len(data)
        if self.drain is not None:
            self.drain.count(data)
        return data

    def _timeout(self, drain: Drain) -> tuple[float, bool]:
        """The timeout of the next read of a drain, and whether a timeout of this read means that all data was read."""
        wait_s = drain.wait_s(None if self.expects_data or self.readable else self._peek_s)
        left_s = drain.left_s()
        if drain.exhausted:
            raise _DrainExhausted
        return min(wait_s, left_s), wait_s <= left_s


class _DrainExhausted(Exception):
    """A limit of a drain is reached."""


class AsyncNetworkTap(NetworkTap):
    """Tap for an ``AsyncClient``."""

    _peek_s = 0.001  # some turns of the event loop: one reads, one delivers; uvloop rounds to milliseconds

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read from the network; replaces the method of the stream."""
        if self.deferred_error is not None:
            raise self.deferred_error
        if self.drain is not None:
            return await self._read_draining(self.drain, max_bytes)
        self.is_reading = True
        try:
            data = await self._original_read(max_bytes, timeout)
        except BaseException as error:
            data = await self._read_after_error(error, max_bytes)
        finally:
            self.is_reading = False
        return self._received(data, max_bytes)

    async def _read_draining(self, drain: Drain, max_bytes: int) -> bytes:
        wait_s, expiry_is_end = self._timeout(drain)
        try:
            return self._received(await self._read_arrived(max_bytes, wait_s), max_bytes)
        except Exception:  # a timeout, or the end of the connection
            # On uvloop, a timeout may end a read before the arrived data is read.
            drain.caught_up = expiry_is_end and not self.readable
            raise

    async def _read_after_error(self, error: BaseException, max_bytes: int) -> bytes:
        """Read data that arrived together with a cancellation or a timeout. If there is no data, raise the error."""
        self.data_lost = True  # unless the following read ends
        with _shielded():
            try:
                data = await self._read_arrived(max_bytes, DRAIN_IDLE_S if self.readable else self._peek_s)
                self.data_lost = False
            except Exception:  # a timeout, or the end of the connection
                data = b""
                self.data_lost = self.readable
        if not data:
            raise error
        self.deferred_error = error
        return data

    async def _read_arrived(self, max_bytes: int, timeout_s: float) -> bytes:
        # uvloop sets its clock at the start of a turn: after a turn that was blocked, a timeout would pass at once.
        await asyncio.sleep(0)
        data: bytes = await self._original_read(max_bytes, timeout_s)
        return data


class SyncNetworkTap(NetworkTap):
    """Tap for a ``Client``."""

    _peek_s = 0.0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read from the network; replaces the method of the stream."""
        if self.drain is not None:
            return self._read_draining(self.drain, max_bytes)
        self.is_reading = True
        try:
            return self._received(self._original_read(max_bytes, timeout), max_bytes)
        except BaseException:
            self.data_lost = self.readable
            raise
        finally:
            self.is_reading = False

    def _read_draining(self, drain: Drain, max_bytes: int) -> bytes:
        wait_s, expiry_is_end = self._timeout(drain)
        try:
            return self._received(self._original_read(max_bytes, wait_s), max_bytes)
        except Exception:
            drain.caught_up = expiry_is_end
            raise


def _shielded() -> AbstractContextManager[Any]:
    """Shield a block from anyio's cancellations, which anyio raises repeatedly."""
    anyio = sys.modules.get("anyio")
    return nullcontext() if anyio is None else anyio.CancelScope(shield=True)
