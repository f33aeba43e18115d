"""The time of a fresh process: the import of the package, and `ktrdr agent budget` from start to end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measures import Measure, Settings, at_most
from benchmarks.servers import running
from benchmarks.service_process import service

__all__ = ["cli"]

_TIMED_IMPORT = "import time; t = time.perf_counter(); import ktrdr_budget; print(time.perf_counter() - t)"


async def cli(settings: Settings) -> list[Measure]:
    """Measure the import and the command in fresh processes. The first process of each only fills the file cache."""
    rounds = settings.rounds(15, 5)
    imports = [_import_s() for _ in range(rounds + 1)][1:]
    with running(settings.store) as server, service(server.url) as port:
        environment = {**os.environ, "KTRDR_API_URL": f"http://127.0.0.1:{port}"}
        commands = [_command_s(environment) for _ in range(rounds + 1)][1:]
    return [
        Measure("import_s", "import ktrdr_budget", "s", tuple(imports), at_most(0.15), detail="fresh processes"),
        Measure("cli_agent_budget_s", "ktrdr agent budget", "s", tuple(commands), at_most(0.4), detail="start to end"),
    ]


def _import_s() -> float:
    done = subprocess.run([sys.executable, "-c", _TIMED_IMPORT], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _command_s(environment: dict[str, str]) -> float:
    script = Path(sys.executable).with_name("ktrdr")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "ktrdr_budget.cli"]
    begun = time.perf_counter()
    done = subprocess.run([*command, "agent", "budget"], env=environment, capture_output=True, text=True, check=True)
    taken = time.perf_counter() - begun
    if "Daily Limit: $" not in done.stdout:
        raise RuntimeError(f"ktrdr agent budget printed {done.stdout[:200]!r}")
    return taken
