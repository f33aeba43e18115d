"""Programs that some tests need and that no Python package brings."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

IN_CI = bool(os.environ.get("CI"))
"""CI installs every program: what is missing there is a failure, not a reason to skip."""


def need(program: str, package: str = "") -> str:
    """The program's path. Without it the test is skipped; in CI it fails."""
    found = shutil.which(program)
    if found is None:
        reason = f"{program} is not installed (Debian: apt-get install {package or program})"
        if IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def compose() -> list[str]:
    """The words that start Docker's compose tool: the client's plugin, or the older program of its own."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    return [need("docker-compose")]
