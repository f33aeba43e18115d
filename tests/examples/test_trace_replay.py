"""The replay of real traffic against a lower cap: the cap holds, and admitted requests are billed exactly."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from examples import trace_replay
from examples.trace_replay import TRACE, draw, read_trace

from ..helpers.keyspace import immortal_keys

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_four_processes_stay_within_the_cap_and_bill_the_exact_cost(server: Any, tmp_path: Path) -> None:
    picture = tmp_path / "hour.png"
    words = ["--requests", "600", "--limit", "0.60", "--speedup", "120", "--store", server.url]
    words += ["--picture", str(picture)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "examples.trace_replay", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    admitted, denied = map(int, re.findall(r"(\d+) admitted, (\d+) denied", done.stdout)[0])
    assert admitted + denied == 600 and denied > 0
    spent = Decimal(re.findall(r"spent \$(\S+) of", done.stdout)[0])
    worth = Decimal(re.findall(r"worth \$(\S+)", done.stdout)[0])
    most = Decimal(re.findall(r"at most \$(\S+) was", done.stdout)[0])
    # The admitted amount depends on the load of the machine.
    assert 0 < spent <= most <= Decimal("0.60") < worth
    assert most > Decimal("0.50")
    assert "exactly" in done.stdout and "below the cap" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    with server.client() as store:
        assert immortal_keys(store) == []


def test_the_bundled_trace_is_complete() -> None:
    trace = read_trace()
    assert len(trace) == 8_819
    assert trace[0].at_s == 0 and trace[-1].at_s == pytest.approx(3435.948, abs=0.001)
    # At $1 and $5 per million tokens; platform.claude.com/docs/en/about-claude/pricing.
    assert sum(request.input_tokens + 5 * request.output_tokens for request in trace) == 19_289_454
    assert all(earlier.at_s <= later.at_s for earlier, later in itertools.pairwise(trace))
    assert "CC-BY 4.0" in TRACE.with_name("README.md").read_text()


def test_the_picture_is_saved_in_the_current_directory_by_default(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn: list[str] = []
    monkeypatch.setattr(trace_replay, "run", _nothing_admitted)
    monkeypatch.setattr(trace_replay, "draw", lambda path, *_: drawn.append(path))
    assert trace_replay.main(["--requests", "3", "--store", server.url]) == 0
    assert drawn == ["trace_replay.png"]
    assert trace_replay.main(["--requests", "3", "--store", server.url, "--picture", ""]) == 0
    assert len(drawn) == 1
    assert "/trace_replay.png" in (ROOT / ".gitignore").read_text().splitlines()


async def _nothing_admitted(replay: Any, requests: list[Any], processes: int) -> Any:
    return [False] * len(requests), [trace_replay.Sample(0, 0, 0)]


def test_a_picture_can_be_drawn_from_few_samples(tmp_path: Path) -> None:
    from examples.trace_replay import Sample

    picture = tmp_path / "hour.svg"
    draw(str(picture), read_trace(3), [1_000, 2_000, 3_000], [Sample(0, 0, 1), Sample(9, 1, 1)], 2.0)
    assert "<svg" in picture.read_text()
