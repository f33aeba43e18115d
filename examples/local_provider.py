"""A local model provider with the APIs of Anthropic and OpenAI, for tests and examples.

It implements Anthropic's Messages API, and OpenAI's Chat Completions, Responses, Completions and Embeddings APIs, as
JSON and as server-sent events, for the unmodified SDKs. It needs no key and no network, and keeps a ledger of the
tokens that it bills.

::

    with LocalProvider() as provider:
        client = Anthropic(base_url=provider.anthropic_url, api_key="any")

    python -m examples.local_provider --port 8100      # for other programs; Ctrl-C prints the ledger

A :class:`Scene` determines the response to a request: the scene in the request's header ``x-scenes`` (a JSON list; the
SDK's second attempt takes the second scene), else the next scene of :meth:`LocalProvider.script` (or ``POST /script``),
else success. ``GET /ledger`` shows the ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from examples.wire_formats import FORMATS, Answer, WireFormat

__all__ = ["Billed", "LocalProvider", "Scene"]


@dataclass(frozen=True, slots=True)
class Scene:
    """The response to one request, including errors, delays and lost connections."""

    status: int = 200
    """For statuses other than 200, the response is the provider's error of this status."""
    text: str | None = None
    """The output; by default as many words as ``output_tokens``."""
    output_tokens: int = 12
    input_tokens: int | None = None
    """By default one token per four bytes of the request."""
    cache_read_tokens: int = 0
    """Part of the input."""
    cache_write_tokens: int = 0
    """Part of the input."""
    cache_write_1h_tokens: int = 0
    """Part of ``cache_write_tokens``."""
    delay_s: float = 0.0
    """Delay before the response."""
    token_delay_s: float = 0.0
    """Delay before each token of a stream."""
    drop_after: int | None = None
    """Close the connection after so many tokens; without a stream, or at 0, before the response."""
    error_after: int | None = None
    """Send an error event after so many tokens of a stream."""
    stall_after: int | None = None
    """Send nothing after so many tokens of a stream, until the caller disconnects."""
    silent: bool = False
    """Omit the usage from the response."""
    billed: bool | None = None
    """Whether tokens are billed; by default those of every response with status 200, even if it is lost."""
    retry_after_ms: int = 1
    """The ``retry-after-ms`` of errors."""

    @property
    def is_billed(self) -> bool:
        """Whether tokens are billed."""
        return self.status == 200 if self.billed is None else self.billed


@dataclass(frozen=True, slots=True)
class Billed:
    """One line of the provider's ledger."""

    provider: str
    model: str
    input_tokens: int
    """All input, including cache reads and cache writes."""
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    """Part of ``cache_write_tokens``."""
    streamed: bool = False
    complete: bool = True
    """False if the response was not sent completely."""


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class LocalProvider:
    """The server, in its own thread.

    Args:
        host, port: the address; port 0 selects a free port.
        scene: the default response.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, scene: Scene | None = None) -> None:
        self.host, self.port = host, port
        self.scene = scene or Scene()
        self.ledger: list[Billed] = []
        """The billed calls, in order."""
        self.requests: list[dict[str, Any]] = []
        """The bodies of all model requests, in order; grows without limit."""
        self.active = 0
        """Requests in progress."""
        self.sent_tokens = 0
        """Tokens sent of the latest stream."""
        self._scenes: deque[Scene] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-provider", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    # -- start and stop ------------------------------------------------------------------------------------------------

    def __enter__(self) -> LocalProvider:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen for connections."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def stop(self) -> None:
        """Close all connections and stop."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # -- public --------------------------------------------------------------------------------------------------------

    @property
    def anthropic_url(self) -> str:
        """The ``base_url`` for the ``anthropic`` SDK."""
        return f"http://{self.host}:{self.port}"

    @property
    def openai_url(self) -> str:
        """The ``base_url`` for the ``openai`` SDK."""
        return f"http://{self.host}:{self.port}/v1"

    def script(self, *scenes: Scene) -> None:
        """Set the responses to the next requests."""
        self._scenes.extend(scenes)

    def clear(self) -> None:
        """Clear the script, the ledger and the requests."""
        self._scenes.clear()
        self.ledger.clear()
        self.requests.clear()
        self.sent_tokens = 0

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (request := await _read(reader)) is not None:
                self.active += 1
                try:
                    keep_open = await self._respond(request, reader, writer)
                finally:
                    self.active -= 1
                if not keep_open:
                    writer.transport.abort()
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _respond(self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Respond to one request; return whether to keep the connection open."""
        path = request.path.partition("?")[0]
        if path == "/ledger":
            return await _send(writer, 200, {"billed": [asdict(line) for line in self.ledger]})
        if path == "/script":
            self.script(*(Scene(**fields) for fields in request.json()))
            return await _send(writer, 200, {})
        wire_format = FORMATS.get(path)
        if wire_format is None or request.method != "POST":
            return await _send(writer, 404, {"error": {"type": "not_found_error", "message": f"no {path}"}})
        if "x-api-key" not in request.headers and "authorization" not in request.headers:
            return await _send(writer, 401, wire_format.error(401))
        if wire_format.counts_only:
            return await _send(writer, 200, {"input_tokens": wire_format.count(request.json())})
        return await self._play(self._scene_of(request), wire_format, request.json(), reader, writer)

    def _scene_of(self, request: _Request) -> Scene:
        header = request.headers.get("x-scenes")
        if header is not None:
            scenes = json.loads(header)
            return Scene(**scenes[min(int(request.headers.get("x-stainless-retry-count", 0)), len(scenes) - 1)])
        return self._scenes.popleft() if self._scenes else self.scene

    # -- responses -----------------------------------------------------------------------------------------------------

    async def _play(
        self,
        scene: Scene,
        wire_format: WireFormat,
        body: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        self.requests.append(body)
        answer = wire_format.answer(
            body,
            input_tokens=scene.input_tokens,
            output_tokens=scene.output_tokens,
            text=scene.text,
            cache=(scene.cache_read_tokens, scene.cache_write_tokens, scene.cache_write_1h_tokens),
            silent=scene.silent,
        )
        streamed = bool(body.get("stream"))
        if streamed and scene.status == 200 and scene.drop_after != 0:
            return await self._stream(scene, wire_format, answer, reader, writer)
        dropped = scene.drop_after is not None
        await _wait(scene.delay_s)
        if scene.is_billed:
            self._bill(
                scene, answer, len(answer.tokens), streamed=streamed, complete=scene.status == 200 and not dropped
            )
        if dropped:
            return False
        if scene.status != 200:
            return await _send(
                writer, scene.status, wire_format.error(scene.status), {"retry-after-ms": scene.retry_after_ms}
            )
        return await _send(writer, 200, wire_format.document(answer))

    async def _stream(
        self,
        scene: Scene,
        wire_format: WireFormat,
        answer: Answer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        sent, billed = 0, not scene.is_billed
        try:
            await _wait(scene.delay_s)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            await _chunk(writer, wire_format.opening(answer))
            for token in answer.tokens:
                if sent == scene.drop_after:
                    return False
                if sent == scene.error_after:
                    await _chunk(writer, wire_format.failure(answer))
                    break
                if sent == scene.stall_after:
                    await reader.read()  # returns when the caller disconnects
                await _wait(scene.token_delay_s)
                if reader.at_eof() or writer.transport.is_closing():
                    return False
                sent += 1  # a token is billed once it is produced, even if it is not read
                await _chunk(writer, wire_format.delta(answer, token))
                self.sent_tokens = sent
            else:
                if not billed:
                    billed = True
                    self._bill(scene, answer, sent, streamed=True, complete=True)
                await _chunk(writer, wire_format.closing(answer))
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            return True
        finally:
            if not billed:
                self._bill(scene, answer, sent, streamed=True, complete=False)

    def _bill(self, scene: Scene, answer: Answer, output_tokens: int, *, streamed: bool, complete: bool) -> None:
        all_output_tokens = output_tokens * answer.choices if answer.tokens else 0
        read, written, written_1h = answer.cache
        self.ledger.append(
            Billed(
                answer.provider,
                answer.model,
                answer.input_tokens,
                all_output_tokens,
                read,
                written,
                written_1h,
                streamed=streamed,
                complete=complete,
            )
        )


async def _read(reader: asyncio.StreamReader) -> _Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip("\r\n").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return _Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))


async def _send(writer: asyncio.StreamWriter, status: int, body: Any, headers: Mapping[str, Any] | None = None) -> bool:
    data = json.dumps(body).encode()
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = f"HTTP/1.1 {status} _\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n{more}\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return True


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    if data:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()


async def _wait(seconds: float) -> None:
    if seconds:
        await asyncio.sleep(seconds)


def main() -> None:
    """Serve until Ctrl-C, then print the ledger."""
    parser = argparse.ArgumentParser(prog="python -m examples.local_provider", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--token-delay", type=float, default=0.02, help="seconds between the tokens of a stream")
    given = parser.parse_args()
    with LocalProvider(given.host, given.port, replace(Scene(), token_delay_s=given.token_delay)) as provider:
        print(f"export ANTHROPIC_BASE_URL={provider.anthropic_url} OPENAI_BASE_URL={provider.openai_url}")
        print("export ANTHROPIC_API_KEY=local OPENAI_API_KEY=local", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            for line in provider.ledger:
                print(f"{line.model}: {line.input_tokens} in, {line.output_tokens} out")


if __name__ == "__main__":
    main()
