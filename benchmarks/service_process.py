"""The service in a process of its own, as `ktrdr serve` runs it, with an additional empty route.

Run as `python -m benchmarks.service_process PORT STORE_URL`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal

from benchmarks.servers import free_port

__all__ = ["service"]

_START_TIMEOUT_S = 20.0


@contextmanager
def service(store_url: str) -> Iterator[int]:
    """The service on the port that is given, as long as the block lasts."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KTRDR_", "AGENT_"))}
    words = [sys.executable, "-m", "benchmarks.service_process", str(port), store_url]
    process = subprocess.Popen(words, env=environment)
    try:
        _wait_ready(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], port: int) -> None:
    ends = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError("the service does not start") from None
            time.sleep(0.02)


def _serve(port: int, store_url: str) -> None:
    import uvicorn
    from fastapi.routing import APIRoute
    from pydantic import SecretStr

    from ktrdr_budget.api.serving import worker_app
    from ktrdr_budget.api.settings import Settings

    async def empty() -> None:
        return None

    limits = {"agent_daily_budget": Decimal(5_000_000), "max_holds": 10**7}  # none is ever settled
    app = worker_app(Settings(redis_url=SecretStr(store_url), timeout=10, **limits))
    # Before all others, where it is found at once.
    app.router.routes.insert(0, APIRoute("/empty", empty, methods=["POST"]))
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning", server_header=False)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
