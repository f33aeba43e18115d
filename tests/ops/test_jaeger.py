"""``make jaeger`` without Go, and the addresses of its parts. The check with a real Jaeger is run by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .support import ROOT

SCRIPT = ROOT / "scripts" / "jaeger.py"


def run(tmp_path: Path, tools: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": str(tools), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)


def go(tmp_path: Path, script: str) -> Path:
    """A directory with a command ``go`` that runs the given script."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "go").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "go").chmod(0o755)
    return tools


def test_a_missing_go_compiler_is_reported_in_one_line(tmp_path: Path):
    done = run(tmp_path, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "jaeger: skipped: Go 1.24 or newer is not installed\n"


@pytest.mark.parametrize("version", ["go1.23.9", "devel", ""])
def test_a_go_compiler_that_is_too_old_is_reported_with_its_version(tmp_path: Path, version: str):
    done = run(tmp_path, go(tmp_path, f"echo {version}"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"jaeger: skipped: Go 1.24 or newer is needed, not {version or 'this one'}\n"


def test_if_the_build_of_jaeger_fails_the_last_line_names_the_cause_and_no_files_remain(tmp_path: Path):
    tools = go(tmp_path, 'test "$1" = env && echo go1.26.8 && exit; echo downloading >&2; echo no network >&2; exit 1')
    done = run(tmp_path, tools)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "jaeger: go mod failed: no network")
    assert list((tmp_path / "cache" / "ktrdr-budget").iterdir()) == []


def test_jaeger_listens_on_loopback_only():
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import jaeger\n"
    code += "print(json.dumps(jaeger.config(*(f'{jaeger.HOST}:{port}' for port in range(1, 5)))))"
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent)], capture_output=True, text=True, check=True)
    endpoints = re.findall(r'"endpoint": "([^"]+)"', json.dumps(json.loads(done.stdout)))
    assert sorted(endpoints) == [f"127.0.0.1:{port}" for port in range(1, 5)]
