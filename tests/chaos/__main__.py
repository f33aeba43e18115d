"""Runs the chaos bench: `python -m tests.chaos --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..conftest import libfaketime
from . import report
from .bench import Figures, Row, play
from .rows import ROWS

SHOWN_MAX = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected faults of the table; the exit code is 1 if a promise was broken."""
    given = _parser().parse_args(arguments)
    if libfaketime() is None:
        print("chaos: libfaketime is not installed (Debian: apt-get install faketime)", file=sys.stderr)
        return 2
    names = given.only or [row.name for row in ROWS]
    when, began, runs = report.now(), time.monotonic(), list[Figures]()
    for row in ROWS:
        if row.name in names:
            seconds = given.seconds or (row.short_s if given.short else 0) or row.seconds
            runs.append(_run(row, given.seed, seconds, given.keep, given.short))
            print(runs[-1].line, flush=True)
            for violation in runs[-1].verdict.violations[:SHOWN_MAX]:
                print(f"  {violation}", flush=True)
    seconds = time.monotonic() - began
    broken = [run.row.name for run in runs if run.verdict.violations]
    print(f"\n{len(runs) - len(broken)} of {len(runs)} rows kept, in {seconds:.0f} s")
    if given.markdown:
        report.rewrite(report.DOCUMENT, runs, when, seconds)
    return 1 if broken else 0


def _run(row: Row, seed: int, seconds: float, keep: Path | None, quick: bool) -> Figures:
    with tempfile.TemporaryDirectory(prefix="chaos") as short_lived:
        place = Path(short_lived)
        if keep is not None:
            place = keep / f"{row.name}-{seed}"
            place.mkdir(parents=True)
        return play(row, seed, seconds, place, quick=quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Provoke faults on real servers.")
    names = [row.name for row in ROWS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="ROW", help=f"of: {', '.join(names)}")
    parser.add_argument("--seed", type=int, default=1, help="seed of the replicas' work and of the faults (default 1)")
    parser.add_argument("--seconds", type=float, help="how long each row provokes its fault (default: set by the row)")
    parser.add_argument("--short", action="store_true", help="run the rows as briefly as `make test` does")
    parser.add_argument("--markdown", action="store_true", help="write the table in docs/reliability.md")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep histories and logs in DIR (a short path)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
