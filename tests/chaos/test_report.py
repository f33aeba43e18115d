"""The line of a run on the terminal, the table of all runs, and the document that contains the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import __main__ as command
from . import report
from .bench import Figures
from .judge import Verdict
from .rows import ROWS

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


def figures(*violations: str, **words: int) -> Figures:
    verdict = Verdict(operations=1234, grants=500, spend=1_500_000_000, **words)
    verdict.violations += violations
    return Figures(ROWS[0], seed=7, seconds=20, faults=3, verdict=verdict)


def test_the_result_of_a_run_is_one_line_on_the_terminal():
    line = figures(unknown=9, resolved=9).line
    assert line.startswith("clients-die: seed 7, 20 s: 1,234 operations, 3 faults, 500 grants, spend $1.500000,")
    assert "overspend 0, lost 0, 9 of 9 unknown resolved" in line and line.endswith(": kept")
    assert figures("something").line.endswith(": BROKEN")
    assert "overspend $0.250000, lost $0.000001" in figures(overspend=250_000_000, lost=1_000).line


def test_a_run_replaces_its_own_row_of_the_table_and_keeps_the_other_rows(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nworn out\n{report.END}\nafter\n")
    other = Figures(ROWS[3], seed=5, seconds=20)
    for runs, when in (([figures(), other], "Monday at a1"), ([figures("something")], "Tuesday at b2")):
        report.rewrite(page, runs, when, 60)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "worn out" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert "| `clients-die` 7 | Tuesday at b2 | **broken** |" in rows[2]
    assert f"| `{ROWS[3].name}` 5 | Monday at a1 | kept |" in rows[3]
    assert "The last run was of `clients-die` only" in text and ", Tuesday at b2, in 60 s" in text


def test_a_run_of_all_rows_replaces_all_earlier_rows(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    for when in ("Monday at a1", "Tuesday at b2"):
        report.rewrite(page, [Figures(row, seed=5, seconds=20) for row in ROWS], when, 60)
    text = page.read_text()
    assert "Monday" not in text and text.count("Tuesday at b2") == len(ROWS) + 1
    assert f"All {len(ROWS)} rows are of one run, Tuesday at b2" in text


def test_a_table_row_with_outdated_columns_is_removed(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n| a | `{ROWS[3].name}` 1 | kept |\n{report.END}\n")
    report.rewrite(page, [figures()], "Monday at a1", 60)
    assert ROWS[3].name not in page.read_text()


def test_a_page_without_markers_is_not_changed(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(ValueError, match="chaos: begin"):
        report.rewrite(page, [figures()], "Monday at a1", 60)
    assert page.read_text() == "nothing here\n"


def test_the_reliability_document_shows_no_broken_promise_in_any_fault_scenario():
    text = DOCUMENT.read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and line.endswith("| kept |")]
    assert [any(f"| `{row.name}` " in line for line in rows) for row in ROWS] == [True] * len(ROWS)
    assert "**broken**" not in text


def test_an_unknown_row_name_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "nothing"])
    assert ended.value.code == 2
    assert "clients-die" in capsys.readouterr().err
