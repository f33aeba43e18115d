"""Read panels as a person sees them, with Grafana's own library: the npm package @grafana/data (Apache License 2.0).

The package and the script that uses it are bundled once. The bundle is kept in the environment that runs the tests.
Neither Grafana nor a browser is needed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from ..helpers.tools import IN_CI, need
from .prometheus import Prometheus

SOURCE = Path(__file__).parent / "grafana"
PACKAGE = SOURCE / "package.json"
SCRIPT = SOURCE / "read.cjs"
INSTALL = ("install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
# One file for every Node.js version: older ones cannot require the ES modules among the packages.
BUNDLE = ("--bundle", "--platform=node", "--target=node18", "--log-level=warning")
DAY_S = 24 * 60 * 60
STEP_S = 60


def bundled() -> Path:
    """Return the path of the script bundled with its dependencies; build the bundle if it is missing."""
    digest = hashlib.sha256(PACKAGE.read_bytes() + SCRIPT.read_bytes()).hexdigest()[:12]
    cache = Path(sys.prefix) if sys.prefix != sys.base_prefix else Path.home() / ".cache" / "ktrdr-budget"
    made = cache / "grafana" / f"read-{digest}.cjs"
    if not made.exists():
        npm = need("npm")
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as name:
            draft = Path(name)
            shutil.copy(PACKAGE, draft)
            shutil.copy(SCRIPT, draft)
            run([npm, *INSTALL], draft)
            run([str(draft / "node_modules/.bin/esbuild"), SCRIPT.name, *BUNDLE, "--outfile=made.cjs"], draft)
            (draft / "made.cjs").replace(made)  # atomically: another process may build it, too
    return made


def run(words: list[str], directory: Path) -> None:
    """Run a command. If the command fails, the test is skipped; in CI, the test fails."""
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        reason = f"{Path(words[0]).name}: {(done.stderr or done.stdout)[-500:]}"
        if IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)


class Grafana:
    """Reads panels on a Prometheus, with each panel's own queries and a value for the variable ``budget``."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self._words = [need("node", "nodejs"), str(bundled())]

    def read(self, panel: dict[str, Any], budget: str = "agent") -> dict[str, str]:
        """Return the texts of a panel of current values, by title."""
        replies = [
            {"refId": query["refId"], "legend": query["legendFormat"], "data": self._reply(query, budget)}
            for query in panel["targets"]
        ]
        return dict(self._run({"panel": panel, "replies": replies}))

    def titles(self, annotation: dict[str, Any]) -> set[str]:
        """Return the titles of an annotation's current events."""
        data = self._prometheus.ask("/query", query=annotation["expr"])
        return set(self._run({"titleFormat": annotation["titleFormat"], "replies": [{"data": data}]}))

    def _reply(self, query: dict[str, Any], budget: str) -> Any:
        expression = query["expr"].replace("$budget", budget).replace("$__range", "24h")
        assert "$" not in expression
        now = time.time()
        if query["instant"]:
            return self._prometheus.ask("/query", query=expression, time=now)
        end = now // STEP_S * STEP_S
        return self._prometheus.ask("/query_range", query=expression, start=end - DAY_S, end=end, step=STEP_S)

    def _run(self, request: dict[str, Any]) -> Any:
        done = subprocess.run(
            self._words,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
