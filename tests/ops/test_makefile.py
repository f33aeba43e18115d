"""The Makefile and the pre-commit configuration: environments, targets and hooks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .files import ROOT

MAKE = "make --no-print-directory"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of a checkout that determine the environment."""
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


@pytest.mark.parametrize("target", ["run", "check", "test", "stack", "wheel", "bench", "audit"])
@pytest.mark.parametrize("kind", ["3.10", "old", ""])
def test_make_prints_one_message_and_creates_nothing_if_python_is_too_old_or_missing(checkout, target, kind):
    python = program(checkout, "old", "exit 1") if kind == "old" else kind
    before = sorted(os.listdir(checkout))
    for given in ({"PYTHON": python}, {}):
        done = make(checkout, target, *([] if given else [f"PYTHON={python}"]), **given)
        assert done.returncode == 2
        message, *others = done.stderr.splitlines()
        found = f": '{python}' is not" if python else "; none was found"
        assert message == f"make: Python 3.11 or newer, with venv, is needed{found}"
        assert len(others) == 1 and others[0].startswith("make: ***")
        assert done.stdout == ""
        assert sorted(os.listdir(checkout)) == before


def test_make_removes_an_incomplete_virtual_environment(checkout):
    broken = program(checkout, "broken", 'case "$1" in -c) exit 0;; esac; mkdir .venv; exit 1')
    assert make(checkout, ".venv/.made", f"PYTHON={broken}").returncode == 2
    assert not (checkout / ".venv").exists()


def test_make_refuses_to_use_a_virtual_environment_with_a_different_python(checkout):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (checkout / ".venv" / ".made").touch()
    other = program(checkout, "other", "echo another")
    for done in (make(checkout, ".venv/.made", f"PYTHON={other}"), make(checkout, ".venv/.made", PYTHON=other)):
        assert done.returncode == 2
        assert done.stderr.startswith(
            f"make: .venv was created with another Python than {other}: 'make clean' removes it\nmake: ***"
        )
    assert make(checkout, ".venv/.made", f"PYTHON={sys.executable}").returncode == 0
    assert make(checkout, ".venv/.made").returncode == 0


def test_make_refuses_a_virtual_environment_not_created_by_make(checkout):
    (checkout / ".venv").mkdir()
    done = make(checkout, ".venv/.made", f"PYTHON={sys.executable}")
    assert done.returncode == 2
    assert "'make clean' removes it" in done.stderr


def test_the_help_target_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    listed = [line.split()[1] for line in make(ROOT, "help").stdout.splitlines()]
    assert sorted(listed) == sorted(set(phony[1].split()) - {"chosen"})


def test_the_check_target_runs_the_linter_and_the_type_checker_and_the_unit_tests(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".test").touch()
    planned = make(checkout, "--dry-run", "--assume-old=.venv/.test", "check", f"PYTHON={sys.executable}").stdout
    commands = [line.removeprefix(".venv/bin/") for line in planned.splitlines() if line.startswith(".venv/bin/")]
    assert commands == ["ruff check .", "ruff format --check .", "mypy", "pytest -q -m unit -n 2"]


def test_the_last_pre_commit_hook_runs_the_check_target():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}, "no downloads, one version of each tool"
    assert hooks[-1]["entry"] == "make check"
    assert hooks[-1]["always_run"] is True


@pytest.mark.slow
@pytest.mark.timeout(1200)  # packages are installed
def test_the_run_target_installs_all_packages_needed_by_the_commands_in_the_readme(tmp_path):
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
