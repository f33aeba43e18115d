"""Reports of runs: the table of `docs/reliability.md`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from ..conftest import redis_binary, valkey_binary
from .bench import Figures, usd
from .rows import ROWS

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
HEADINGS = (
    "fault", "must hold", "operations", "faults", "grants", "spend", "overspend", "lost", "unknown resolved",
    "losses noticed", "longest call", "late", "seed", "run", "",
)  # fmt: skip


def table(runs: Iterable[Figures], when: str, before: str = "") -> str:
    """The table in Markdown: these runs replace their own rows of the table ``before``; its other rows stay.

    Args:
        when: date and commit of these runs, for the column ``run`` of their rows.
    """
    columns = _line(HEADINGS).count("|")
    rows = [line for line in before.splitlines() if "| `" in line and line.count("|") == columns]
    by_name = {line.rsplit("| `", 1)[1].partition("`")[0]: line for line in rows}
    by_name |= {run.row.name: _line(_row(run, when)) for run in runs}
    return "\n".join(
        [
            _line(HEADINGS),
            _line(("---", "---", *("---:",) * 11, "---", "---")),
            *(by_name[r.name] for r in ROWS if r.name in by_name),
        ]
    )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(run: Figures, when: str) -> tuple[str, ...]:
    v = run.verdict
    return (
        run.row.fault,
        run.row.must_hold,
        f"{v.operations:,}",
        f"{run.faults:,}",
        f"{v.grants:,}",
        f"${v.spend / 1e9:,.6f}",
        usd(v.overspend),
        usd(v.lost),
        f"{v.resolved:,} of {v.unknown:,}",
        f"{run.losses:,}",
        f"{v.longest_s:.2f} s",
        f"{v.late_s:.2f} s",
        f"`{run.row.name}` {run.seed}",
        when,
        "**broken**" if v.violations else "kept",
    )


def circumstances(runs: Sequence[Figures], when: str, seconds: float) -> str:
    """Rows, date, machine and versions of the last run."""
    kinds = {"valkey": valkey_binary(), "redis": redis_binary()}
    servers = ", ".join(f"{kind}-server {_server_version(binary)}" for kind, binary in kinds.items() if binary)
    if len({run.row.name for run in runs}) == len(ROWS):
        scope = f"All {len(ROWS)} rows are of one run"
    else:
        names = ", ".join(f"`{run.row.name}`" for run in runs)
        scope = f"The last run was of {names} only (the others are of earlier ones: see their last columns)"
    return (
        f"{scope}, {when}, in {seconds:.0f} s, on {os.cpu_count()} cores ({platform.system()} {platform.machine()});"
        f" Python {platform.python_version()}, redis-py {version('redis')}, {servers}."
    )


def now() -> str:
    """Date and commit of a run, to be read before it begins."""
    return f"{datetime.now(UTC):%Y-%m-%d} at {_commit()}"


def _server_version(binary: str) -> str:
    words = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return next(word.removeprefix("v=") for word in words if word.startswith("v="))


def _commit() -> str:
    git = ["git", "-C", str(DOCUMENT.parents[1])]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", f":!{DOCUMENT}"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def rewrite(path: Path, runs: Sequence[Figures], when: str, seconds: float) -> None:
    """Replace the rows of these runs in the table between the two markers of a document; all other rows stay.

    Args:
        when: the result of :func:`now` before the runs.

    Raises:
        ValueError: a marker is missing.
    """
    text = path.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    table_before, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"{path} has no {BEGIN} … {END}")
    section = f"{circumstances(runs, when, seconds)}\n\n{table(runs, when, table_before)}"
    path.write_text(f"{before}{begun}\n\n{section}\n\n{ended}{after}", encoding="utf-8")
