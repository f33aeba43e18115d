"""The short form of the chaos bench: most rows, some seconds each; `make chaos` runs all rows for minutes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from .bench import GRANTS_MIN, Figures, Row, play
from .rows import ROWS

SHORT = sorted((row for row in ROWS if row.short_s), key=lambda row: -row.short_s)
"""The longest row is first, so that it does not run alone at the end."""
AT_ONCE = 5
"""More runs than cores, because a run mostly waits for timeouts, deadlines and repairs."""

Runs = dict[str, Future[Figures]]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, start_clocked_server: object
) -> Iterator[Runs]:
    """Start a run of each selected row; a test awaits the result of its row."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = {words["row"].name for words in params if isinstance(words.get("row"), Row)}
    with ThreadPoolExecutor(AT_ONCE) as pool:

        def begin(row: Row) -> Future[Figures]:
            place, seed = Path(tmp_path_factory.mktemp("c")), random.randrange(10**6)
            return pool.submit(play, row, seed, row.short_s, place, quick=True)

        yield {row.name: begin(row) for row in SHORT if row.name in selected}


@pytest.mark.slow
@pytest.mark.parametrize("row", SHORT, ids=lambda row: row.name)
def test_the_chaos_bench_finds_no_violation_and_resolves_every_unknown_outcome(row: Row, runs: Runs) -> None:
    figures = runs[row.name].result()
    print(figures.line)
    assert not figures.verdict.violations, "\n".join(figures.verdict.violations[:20])
    assert figures.faults > 0
    assert figures.verdict.grants >= GRANTS_MIN
    assert figures.verdict.resolved == figures.verdict.unknown
