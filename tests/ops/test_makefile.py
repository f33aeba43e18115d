"""The environment that `make` makes: with the Python that was asked for, or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .files import ROOT

MAKE = "make --no-print-directory"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of one as the environment is made of."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(checkout: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        [*MAKE.split(), *words], cwd=checkout, env={**kept, **variables}, capture_output=True, text=True, check=False
    )


def program(checkout: Path, name: str, script: str) -> str:
    path = checkout / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"./{name}"


@pytest.mark.parametrize("target", ["run", "test", "stack", "wheel", "bench", "audit"])
@pytest.mark.parametrize("kind", ["3.10", "old", ""])
def test_a_python_that_is_too_old_is_one_clear_error_and_leaves_nothing(checkout, target, kind):
    python = program(checkout, "old", "exit 1") if kind == "old" else kind
    before = sorted(os.listdir(checkout))
    for given in ({"PYTHON": python}, {}):
        done = make(checkout, target, *([] if given else [f"PYTHON={python}"]), **given)
        assert done.returncode == 2
        said, *others = done.stderr.splitlines()
        found = f": '{python}' is not" if python else "; none was found"
        assert said == f"make: Python 3.11 or newer, with venv, is needed{found}"
        assert len(others) == 1 and others[0].startswith("make: ***")
        assert done.stdout == ""
        assert sorted(os.listdir(checkout)) == before


def test_an_environment_that_cannot_be_made_is_not_left_behind(checkout):
    broken = program(checkout, "broken", 'case "$1" in -c) exit 0;; esac; mkdir .venv; exit 1')
    assert make(checkout, ".venv/.made", f"PYTHON={broken}").returncode == 2
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_given_later_is_not_ignored(checkout):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (checkout / ".venv" / ".made").touch()
    other = program(checkout, "other", "echo another")
    for done in (make(checkout, ".venv/.made", f"PYTHON={other}"), make(checkout, ".venv/.made", PYTHON=other)):
        assert done.returncode == 2
        assert done.stderr.startswith(
            f"make: .venv was made with another Python than {other}: 'make clean' removes it\nmake: ***"
        )
    assert make(checkout, ".venv/.made", f"PYTHON={sys.executable}").returncode == 0
    assert make(checkout, ".venv/.made").returncode == 0


def test_an_environment_that_make_did_not_complete_is_not_built_upon(checkout):
    (checkout / ".venv").mkdir()
    done = make(checkout, ".venv/.made", f"PYTHON={sys.executable}")
    assert done.returncode == 2
    assert "'make clean' removes it" in done.stderr


@pytest.mark.slow
def test_what_make_run_installs_is_enough_for_the_commands_of_the_readme(tmp_path):
    """`ktrdr prices show` needs the price list."""
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "ktrdr_budget", "lua"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    done = make(tmp_path, ".venv/.run", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        [tmp_path / ".venv" / "bin" / "ktrdr", "prices", "show", "claude-haiku-4-5"], capture_output=True, text=True
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("Model:   anthropic/claude-haiku-4-5\n")
    served = subprocess.run([tmp_path / ".venv" / "bin" / "ktrdr", "serve", "--port", "x"], capture_output=True)
    assert served.returncode == 2
