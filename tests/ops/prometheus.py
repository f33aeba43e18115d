"""A real Prometheus that scrapes replicas."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import httpx
import yaml

from ..conftest import free_port
from ..helpers.tools import need
from ..helpers.waiting import wait_until
from .files import ALERTS, PROMETHEUS, read_yaml


class Prometheus:
    """A Prometheus with the stack's configuration, except for the targets and the scrape interval (in seconds)."""

    def __init__(self, directory: Path, targets: list[str], interval: float = 0.5, rules: Path = ALERTS) -> None:
        config = read_yaml(PROMETHEUS)
        every = f"{round(interval * 1000)}ms"
        config["global"].update(scrape_interval=every, scrape_timeout=every, evaluation_interval="1s")
        config["rule_files"] = [str(rules)]
        (backend, itself) = config["scrape_configs"]
        assert itself["job_name"] == "prometheus"
        backend["static_configs"] = [{"targets": targets}]
        config["scrape_configs"] = [backend]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        words = [need("prometheus"), f"--config.file={directory}/prometheus.yml", f"--web.listen-address={address}"]
        words += [f"--storage.tsdb.path={directory}/data", "--log.level=warn"]
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log)
        self._client = httpx.Client(base_url=f"http://{address}/api/v1", timeout=60)
        wait_until(lambda: self._ready(f"http://{address}/-/ready"))

    def _ready(self, url: str) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self._client.get(url).is_success
        except httpx.TransportError:
            return False

    def end(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(20)

    def ask(self, path: str, **parameters: Any) -> Any:
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, expression: str) -> float | None:
        """Return the current value of an expression with one sample."""
        found = self.ask("/query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def series(self, expression: str, *, instant: bool, start: float, end: float) -> dict[str, list[float]]:
        """Return the values of each series of a panel, by labels."""
        if instant:
            found = self.ask("/query", query=expression, time=end)["result"]
            samples = [(one["metric"], [one["value"]]) for one in found]
        else:
            found = self.ask("/query_range", query=expression, start=start, end=end, step=0.5)["result"]
            samples = [(one["metric"], one["values"]) for one in found]
        return {
            ",".join(f"{name}={labels[name]}" for name in sorted(labels)): [float(value) for _, value in values]
            for labels, values in samples
        }
