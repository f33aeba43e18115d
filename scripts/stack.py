"""Run the services of docker-compose.yml without containers, as far as they are installed; run by ``make stack``.

Replicas of the service (``ktrdr serve``) on one store, one address in front of them, and Prometheus if it is installed.
The store is KTRDR_REDIS_URL, or one embedded server in AGENT_BUDGET_DIR that all replicas share. Every variable of the
environment reaches the replicas: AGENT_DAILY_BUDGET, OTEL_EXPORTER_OTLP_ENDPOINT, ...

The stack stays in the foreground. Ctrl-C or SIGTERM ends all parts, with exit code 0; if a part dies or does not start,
the others are stopped, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ktrdr_budget.engine import embedded
from ktrdr_budget.environment import data_dir, store_url

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
READY_WITHIN_S = 30.0
STOP_WITHIN_S = 20.0
"""Longer than the service's own shutdown timeout."""
SCRAPE_INTERVAL = "2s"


class StackError(Exception):
    """A part of the stack does not start or has died; the message is one line."""


class Child:
    """A process with its name as a prefix of its output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._listening = asyncio.Event()

    async def start(self, *words: str | Path) -> None:
        """Start the process in a new session: the stack handles Ctrl-C and stops its parts in order."""
        pipe, same = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        self._process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=same, limit=2**20, start_new_session=True
        )
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        async for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            if text.startswith("listening on "):
                self.url = text.removeprefix("listening on ")
                self._listening.set()
            say(f"{self.name} | {text}")

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    async def wait_listening(self) -> None:
        """Wait until the process has printed its URL."""
        await self._listening.wait()

    async def wait_dead(self) -> None:
        """Wait for the end of the process, which is an error.

        Raises:
            StackError: always.
        """
        assert self._process is not None and self._reader is not None
        code = await self._process.wait()
        await self._reader
        raise StackError(f"{self.name} has ended with exit code {code}")

    async def stop(self) -> None:
        """Stop the process with SIGTERM, as a service manager does."""
        if self._process is None or self._reader is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_WITHIN_S)
        except TimeoutError:
            say(f"stack: {self.name} did not stop in time; killing it")
            self._process.kill()
            await self._process.wait()
        await self._reader


class Proxy:
    """One address for all replicas: connections are balanced round robin."""

    def __init__(self) -> None:
        self._ports: list[int] = []
        self._turn = itertools.count()
        self._server: asyncio.Server | None = None

    async def start(self, port: int) -> str:
        """Accept connections, which are closed until there are replicas; return the URL."""
        try:
            self._server = await asyncio.start_server(self._serve, HOST, port)
        except OSError as error:
            raise StackError(f"cannot listen on {HOST} port {port}: {os.strerror(error.errno or 0)}") from None
        return f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def forward_to(self, urls: Sequence[str]) -> None:
        """The replicas."""
        self._ports = [urlsplit(url).port or 0 for url in urls]

    async def stop(self) -> None:
        """Stop accepting connections."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            replica = await asyncio.open_connection(HOST, self._ports[next(self._turn) % len(self._ports)])
        except (OSError, ZeroDivisionError):  # dead, or not started yet
            writer.close()
            return
        with contextlib.suppress(OSError):
            await asyncio.gather(_pass_on(reader, replica[1]), _pass_on(replica[0], writer))
        replica[1].close()
        writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()  # also ends the other direction
        raise


class Stack:
    """All parts of the stack."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._cleanup = contextlib.ExitStack()
        self._children: list[Child] = []
        self._proxy = Proxy()

    async def run(self) -> None:
        """Start all parts, print their addresses, and wait until one dies.

        Raises:
            StackError: one has died, or does not start.
        """
        address = await self._proxy.start(self._options.port)
        await self._open_store()
        replicas = [await self._start_replica(number) for number in range(self._options.replicas)]
        await self._while_alive(self._until_ready(replicas))
        self._proxy.forward_to([replica.url for replica in replicas])
        prometheus = await self._start_prometheus([replica.url for replica in replicas])
        self._announce(address, replicas, prometheus)
        await self._while_alive(asyncio.Event().wait())

    async def stop(self) -> None:
        """Stop all parts, the store last."""
        await self._proxy.stop()
        await asyncio.gather(*(child.stop() for child in self._children))
        self._cleanup.close()

    async def _while_alive(self, work: object) -> None:
        """Await work, unless a child dies first."""
        tasks = [asyncio.ensure_future(child.wait_dead()) for child in self._children]
        tasks.append(asyncio.ensure_future(work))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _open_store(self) -> None:
        """Start or join the embedded server, so that it outlives each replica."""
        if store_url() is not None:
            return
        try:
            self._cleanup.enter_context(await asyncio.to_thread(embedded.start, data_dir()))
        except embedded.EmbeddedServerError as error:
            raise StackError(str(error)) from None

    async def _start_replica(self, number: int) -> Child:
        child = Child(f"replica-{number + 1}")
        self._children.append(child)
        port = self._options.replica_port + number if self._options.replica_port else 0
        await child.start(sys.executable, "-m", "ktrdr_budget.cli", "serve", "--host", HOST, "--port", str(port))
        return child

    async def _until_ready(self, replicas: Sequence[Child]) -> None:
        for replica in replicas:
            try:
                async with asyncio.timeout(READY_WITHIN_S):
                    await replica.wait_listening()
            except TimeoutError:
                raise StackError(f"{replica.name} does not listen") from None
            await _until_answers(replica.name, f"{replica.url}/readyz")

    async def _start_prometheus(self, targets: Sequence[str]) -> str:
        """Start Prometheus; return its URL, empty if it is left out."""
        binary = shutil.which("prometheus")
        if binary is None or self._options.no_prometheus:
            return ""
        directory = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ktrdr-stack-")))
        (directory / "prometheus.yml").write_text(prometheus_config(targets))
        place = f"{HOST}:{self._options.prometheus_port or free_port()}"
        child = Child("prometheus")
        self._children.append(child)
        await child.start(
            binary,
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={place}",
            "--log.level=warn",
        )
        await self._while_alive(_until_answers("prometheus", f"http://{place}/-/ready"))
        return f"http://{place}"

    def _announce(self, address: str, replicas: Sequence[Child], prometheus: str) -> None:
        endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
        missing = "not started (--no-prometheus)" if self._options.no_prometheus else "not installed on this machine"
        places = [
            ("service", f"{address} (each connection goes to the next replica)"),
            *((replica.name, f"{replica.url} (process {replica.pid})") for replica in replicas),
            ("prometheus", prometheus or missing),
            ("traces", f"to {_without_user(endpoint)}" if endpoint else "not sent; set OTEL_EXPORTER_OTLP_ENDPOINT"),
            ("grafana", "not part of this; docker-compose.yml has it"),
        ]
        for name, place in places:
            say(f"stack: {name:<11} {place}")
        say("stack: ready; scripts/verify.sh checks it, Ctrl-C stops it")


def prometheus_config(targets: Sequence[str]) -> str:
    """Return a configuration with each replica as a target and the stack's alerts. (JSON is YAML.)"""
    rules = [str(ROOT / "docker" / "prometheus" / "alerts.yml")]
    places = [urlsplit(target).netloc for target in targets]
    scrape = {"job_name": "ktrdr-backend", "static_configs": [{"targets": places}]}
    intervals = {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL}
    return json.dumps({"global": intervals, "rule_files": rules, "scrape_configs": [scrape]}, indent=2)


async def _until_answers(name: str, url: str) -> None:
    """Wait until a URL replies with success; raise with the last failure otherwise."""
    ends = asyncio.get_running_loop().time() + READY_WITHIN_S
    while fault := await asyncio.to_thread(_fault, url):
        if asyncio.get_running_loop().time() > ends:
            raise StackError(f"{name} is not ready: {fault}")
        await asyncio.sleep(0.1)


def _fault(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 -- our own
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return " ".join(error.read(500).decode(errors="replace").split())
    except OSError as error:
        return str(error)


def _without_user(url: str) -> str:
    return url if "@" not in url else f"{urlsplit(url).scheme}://...@{url.rpartition('@')[2]}"


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def say(line: str) -> None:
    """Write a line to stdout without buffering; ignore a closed terminal, so that all parts are stopped."""
    with contextlib.suppress(OSError):
        print(line, flush=True)  # noqa: T201


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].replace("``", ""))
    parser.add_argument("--port", type=int, default=8000, help="port of the common address (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=2, help="number of replicas (default: %(default)s)")
    parser.add_argument("--replica-port", type=int, default=8001, help="first replica port (default: %(default)s)")
    parser.add_argument("--prometheus-port", type=int, default=9090, help="(default: %(default)s)")
    parser.add_argument("--no-prometheus", action="store_true", help="run without Prometheus")
    parser.epilog = "A port of 0 is a free one."
    return parser.parse_args()


async def main() -> int:
    """Run the stack; return the exit code."""
    stack = Stack(arguments())
    running = asyncio.ensure_future(stack.run())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        say("stack: stopping")
        return 0
    except StackError as error:
        say(f"stack: {error}; stopping")
    finally:
        await stack.stop()
    return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
