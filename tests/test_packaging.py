"""A wheel that is built, installed into an empty environment, and used."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import sys
from ktrdr_budget import Budget, BudgetExceeded, BudgetLimiter
with BudgetLimiter(None, [Budget("agent", "0.20")], data_dir=sys.argv[1]) as limiter:
    limiter.reserve("agent", "0.15").commit("0.12")
    try:
        limiter.reserve("agent", "0.15")
    except BudgetExceeded as denied:
        print(denied)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    [built] = out.glob("*.whl")
    return built


def test_the_wheel_carries_every_script_and_nothing_of_the_tests(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    scripts = {Path(name).name for name in names if name.endswith(".lua")}
    assert scripts == {path.name for path in (ROOT / "lua").glob("*.lua")}
    assert {"ktrdr_budget/py.typed", "ktrdr_budget/agent/data/prices.csv"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path):
    venv.create(tmp_path / "v", with_pip=True)
    python = tmp_path / "v" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    used = subprocess.run([python, "-c", USE, tmp_path / "d"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert used.stdout == "agent: budget_exhausted ($0.08 remaining, need $0.15)\n"
    for name in ("ktrdr", "ktrdr-budget"):
        shown = subprocess.run([tmp_path / "v" / "bin" / name, "--version"], check=True, capture_output=True, text=True)
        assert "0.1.0" in shown.stdout
    refused = subprocess.run([tmp_path / "v" / "bin" / "ktrdr", "serve"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1
    assert "ktrdr-budget[server]" in refused.stderr
    assert "Traceback" not in refused.stderr
