"""A model provider on this machine that speaks the wire formats of two real ones, for tests and examples.

It answers Anthropic's Messages API, and OpenAI's Chat Completions, Responses, Completions and Embeddings APIs, as JSON
and as server-sent events, to the providers' own unmodified SDKs. It needs no key and no network, and it keeps a ledger
of the tokens that it would have billed.

::

    with LocalProvider() as provider:
        client = Anthropic(base_url=provider.anthropic_url, api_key="any")

    python -m examples.local_provider --port 8100      # for other programs; Ctrl-C prints what was billed

What it answers next is a :class:`Scene`: from the request's header ``x-scenes`` (a JSON list; an SDK's second attempt
takes the second), else the next one given to :meth:`LocalProvider.script` (or ``POST /script``), else a plain success.
``GET /ledger`` shows what was billed.
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
    """How one request is answered."""

    status: int = 200
    """Anything but 200 answers with that provider's error of this status."""
    text: str | None = None
    """What the model says; by default as many words as ``output_tokens``."""
    output_tokens: int = 12
    input_tokens: int | None = None
    """By default about one token per four bytes of the request."""
    cache_read_tokens: int = 0
    """Part of the input."""
    cache_write_tokens: int = 0
    """Part of the input."""
    cache_write_1h_tokens: int = 0
    """Part of what is written to the cache."""
    delay_s: float = 0.0
    """Before the answer begins."""
    token_delay_s: float = 0.0
    """Before each token of a stream."""
    drop_after: int | None = None
    """The connection is cut after so many tokens were sent; without a stream, or at 0, before any answer."""
    error_after: int | None = None
    """A stream tells of an error after so many tokens."""
    stall_after: int | None = None
    """A stream says no more after so many tokens, until its caller leaves."""
    silent: bool = False
    """The answer tells no usage."""
    billed: bool | None = None
    """Whether tokens are billed: by default those of every answer of 200, whether it arrives or not."""
    retry_after_ms: int = 1
    """What errors ask an SDK to wait."""

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
    """All input; what was read from a cache or written to it is part of it."""
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    """Part of what was written to the cache."""
    streamed: bool = False
    complete: bool = True
    """False if the caller did not get all of the answer."""


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class LocalProvider:
    """The server, in a thread of its own.

    Args:
        host, port: where it listens; port 0 takes a free one.
        scene: the answer to requests that are given no other.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, scene: Scene | None = None) -> None:
        self.host, self.port = host, port
        self.scene = scene or Scene()
        self.ledger: list[Billed] = []
        """What was billed, in order."""
        self.requests: list[dict[str, Any]] = []
        """The bodies of the requests for answers, in order; the provider's memory, so not for long runs."""
        self.active = 0
        """Requests that are being answered."""
        self.sent_tokens = 0
        """Of the latest stream."""
        self._scenes: deque[Scene] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-provider", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    # -- life ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> LocalProvider:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listens."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def stop(self) -> None:
        """Ends every connection."""
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

    # -- what users set and see ----------------------------------------------------------------------------------------

    @property
    def anthropic_url(self) -> str:
        """The ``base_url`` for the ``anthropic`` SDK."""
        return f"http://{self.host}:{self.port}"

    @property
    def openai_url(self) -> str:
        """The ``base_url`` for the ``openai`` SDK."""
        return f"http://{self.host}:{self.port}/v1"

    def script(self, *scenes: Scene) -> None:
        """The answers to the next requests."""
        self._scenes.extend(scenes)

    def clear(self) -> None:
        """Forgets the script, the ledger and the requests."""
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
                    kept = await self._answer(request, reader, writer)
                finally:
                    self.active -= 1
                if not kept:
                    writer.transport.abort()
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; false if the connection is to be cut."""
        path = request.path.partition("?")[0]
        if path == "/ledger":
            return await _send(writer, 200, {"billed": [asdict(line) for line in self.ledger]})
        if path == "/script":
            self.script(*(Scene(**told) for told in request.json()))
            return await _send(writer, 200, {})
        spoken = FORMATS.get(path)
        if spoken is None or request.method != "POST":
            return await _send(writer, 404, {"error": {"type": "not_found_error", "message": f"no {path}"}})
        if "x-api-key" not in request.headers and "authorization" not in request.headers:
            return await _send(writer, 401, spoken.error(401))
        if spoken.counts_only:
            return await _send(writer, 200, {"input_tokens": spoken.count(request.json())})
        return await self._play(self._scene_of(request), spoken, request.json(), reader, writer)

    def _scene_of(self, request: _Request) -> Scene:
        told = request.headers.get("x-scenes")
        if told is not None:
            scenes = json.loads(told)
            return Scene(**scenes[min(int(request.headers.get("x-stainless-retry-count", 0)), len(scenes) - 1)])
        return self._scenes.popleft() if self._scenes else self.scene

    # -- an answer -----------------------------------------------------------------------------------------------------

    async def _play(
        self,
        scene: Scene,
        spoken: WireFormat,
        body: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        self.requests.append(body)
        answer = spoken.answer(
            body,
            input_tokens=scene.input_tokens,
            output_tokens=scene.output_tokens,
            text=scene.text,
            cache=(scene.cache_read_tokens, scene.cache_write_tokens, scene.cache_write_1h_tokens),
            silent=scene.silent,
        )
        streamed = bool(body.get("stream"))
        if streamed and scene.status == 200 and scene.drop_after != 0:
            return await self._stream(scene, spoken, answer, reader, writer)
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
                writer, scene.status, spoken.error(scene.status), {"retry-after-ms": scene.retry_after_ms}
            )
        return await _send(writer, 200, spoken.document(answer))

    async def _stream(
        self,
        scene: Scene,
        spoken: WireFormat,
        answer: Answer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        sent, billed = 0, not scene.is_billed
        try:
            await _wait(scene.delay_s)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            await _chunk(writer, spoken.opening(answer))
            for token in answer.tokens:
                if sent == scene.drop_after:
                    return False
                if sent == scene.error_after:
                    await _chunk(writer, spoken.failure(answer))
                    break
                if sent == scene.stall_after:
                    await reader.read()  # ends when the caller hangs up
                await _wait(scene.token_delay_s)
                if reader.at_eof() or writer.transport.is_closing():
                    return False
                sent += 1  # a token is billed once it is made, whoever reads it
                await _chunk(writer, spoken.delta(answer, token))
                self.sent_tokens = sent
            else:
                if not billed:
                    billed = True
                    self._bill(scene, answer, sent, streamed=True, complete=True)
                await _chunk(writer, spoken.closing(answer))
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            return True
        finally:
            if not billed:
                self._bill(scene, answer, sent, streamed=True, complete=False)

    def _bill(self, scene: Scene, answer: Answer, output_tokens: int, *, streamed: bool, complete: bool) -> None:
        made = output_tokens * answer.choices if answer.tokens else 0
        read, written, written_1h = answer.cache
        self.ledger.append(
            Billed(
                answer.provider,
                answer.model,
                answer.input_tokens,
                made,
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
    """Serves until Ctrl-C, then prints the ledger."""
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
