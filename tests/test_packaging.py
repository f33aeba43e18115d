"""A wheel that is built, installed into an empty environment, and used."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from functools import partial
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1200)  # packages are installed
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUARD = """
from anthropic import Anthropic
from ktrdr_budget import Budget, BudgetLimiter, guard
guard(Anthropic(api_key="x"), BudgetLimiter(None, [Budget("agent", 1)]))
"""
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


def test_the_wheel_contains_every_lua_script_and_no_tests(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    scripts = {Path(name).name for name in names if name.endswith(".lua")}
    assert scripts == {path.name for path in (ROOT / "lua").glob("*.lua")}
    assert {"ktrdr_budget/py.typed", "ktrdr_budget/agent/data/prices.csv"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh copy of the files that the package is built from."""
    target = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "ktrdr_budget", "lua"):
        copy = (
            partial(shutil.copytree, ignore=shutil.ignore_patterns("__pycache__"))
            if (ROOT / name).is_dir()
            else shutil.copy
        )
        copy(ROOT / name, target / name)
    return target


def in_a_venv(directory: Path, cwd: Path, script: str) -> str:
    """Run a bash script in an empty virtual environment; return its output."""
    if not (directory / "v").exists():
        venv.create(directory / "v", with_pip=True)
    environment = {
        **os.environ,
        "PATH": f"{directory / 'v' / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(
        ["bash", "-euc", script], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_install_commands_in_the_readme_work_in_an_empty_environment(checkout: Path, tmp_path: Path):
    """The README installs from the repository or from a wheel; the test runs each in an empty environment."""
    [block] = re.findall(r"^### Install\n.*?^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    from_here, *from_a_wheel = block.splitlines()
    for number, script in enumerate((from_here, "\n".join(from_a_wheel))):
        place = tmp_path / str(number)
        place.mkdir()
        in_a_venv(place, checkout, script)
        assert in_a_venv(place, place, "ktrdr --version") == "ktrdr 0.1.0\n"
        assert "anthropic/claude-haiku-4-5" in in_a_venv(place, place, "ktrdr prices show claude-haiku-4-5")
        in_a_venv(place, place, f"python -c {shlex.quote(GUARD)}")


def test_the_readme_lists_exactly_the_extras_meant_for_users():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    [sentence] = re.findall(r"^The extras: (.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == set(extras) - {"bench", "examples", "test"}


@pytest.mark.slow
def test_the_wheel_can_be_installed_and_used_in_an_empty_environment(wheel: Path, tmp_path: Path):
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
    assert "Traceback" not in refused.stderr
    # What the error says is to be typed works where the package is installed, though no index has it.
    [words] = re.findall(r"pip install 'ktrdr-budget\[server\]'", refused.stderr)
    in_a_venv(tmp_path, tmp_path, f"python -m {words}")
    served = subprocess.run(
        [tmp_path / "v" / "bin" / "ktrdr", "serve", "--host", "nowhere.invalid"], capture_output=True, text=True
    )
    assert (served.returncode, served.stderr) == (2, "ktrdr: not an address of this machine: 'nowhere.invalid'\n")
