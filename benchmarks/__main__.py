"""Run the benchmarks and report the figures: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.cli import cli
from benchmarks.client import concurrency, latency
from benchmarks.cluster import cluster
from benchmarks.guard_overhead import guard_overhead
from benchmarks.http_service import http_service
from benchmarks.lease import lease
from benchmarks.measures import Measure, Settings
from benchmarks.memory import memory
from benchmarks.policies import policies
from benchmarks.server_time import full_store, server_time
from benchmarks.servers import binary_of

GROUPS: dict[str, Callable[[Settings], Coroutine[Any, Any, list[Measure]]]] = {
    "concurrency": concurrency,
    "latency": latency,
    "server": server_time,
    "full": full_store,
    "memory": memory,
    "http": http_service,
    "cli": cli,
    "guards": guard_overhead,
    "lease": lease,
    "policies": policies,
    "cluster": cluster,
}
PEERS = {"limits": "limits", "throttled": "throttled-py"}
"""The modules of the peers, each with the package that installs the module."""
DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the groups that the arguments name; return the exit code."""
    given = _parser().parse_args(arguments)
    settings = Settings(quick=given.quick, store="redis" if given.redis else "valkey", rounds_max=given.rounds)
    if binary_of(settings.store) is None:
        print(f"benchmarks: {settings.store}-server is not installed", file=sys.stderr)
        return 2
    groups = given.only or list(GROUPS)
    if missing := _missing_peers(groups, settings):
        print(f"benchmarks: {' and '.join(missing)} not installed: `make bench` installs them", file=sys.stderr)
        return 2
    begun = time.monotonic()
    measures = _run(groups, settings)
    about = report.circumstances(settings, time.monotonic() - begun)
    print(report.table(measures))
    missed = [measure.title for measure in measures if not measure.met]
    print(f"\n{len(measures) - len(missed)} of {len(measures)} targets met, in {about['seconds']:.0f} s")
    if given.json:
        text = json.dumps(report.document(measures, about), indent=2, ensure_ascii=False) + "\n"
        given.json.write_text(text, encoding="utf-8")
    if given.markdown:
        report.rewrite(DOCUMENT, measures, about)
    return 1 if given.check and missed else 0


def _missing_peers(groups: Sequence[str], settings: Settings) -> list[str]:
    """Return the packages of the peers (rival rate limiters) that the groups need but that are not installed."""
    needed = "concurrency" in groups or ("lease" in groups and not settings.quick)
    return [peer for module, peer in PEERS.items() if needed and importlib.util.find_spec(module) is None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run fewer and shorter rounds, and store fewer holds")
    parser.add_argument("--rounds", type=int, metavar="N", help="run at most N rounds; with 1, there is no spread")
    parser.add_argument("--redis", action="store_true", help="start this machine's redis-server instead of Valkey")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/benchmarks.md, too")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    return parser


def _run(groups: Sequence[str], settings: Settings) -> list[Measure]:
    logging.basicConfig(level=logging.WARNING)
    measures: list[Measure] = []
    for name in groups:
        begun = time.monotonic()
        report.note(f"{name} …")
        measures += asyncio.run(GROUPS[name](settings))
        report.note(f"{name} took {time.monotonic() - begun:.0f} s")
    return measures


if __name__ == "__main__":
    sys.exit(main())
