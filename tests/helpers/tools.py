"""Programs that some tests need and no Python package contains."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

IN_CI = bool(os.environ.get("CI"))
"""CI installs every program: there, a missing program is a failure, not a reason to skip."""


def need(program: str, package: str = "") -> str:
    """Return the program's path. Without the program the test is skipped; in CI it fails."""
    found = shutil.which(program)
    if found is None:
        reason = f"{program} is not installed (Debian: apt-get install {package or program})"
        if IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def compose() -> list[str]:
    """The command of Docker Compose: the plugin, or the older program."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    return [need("docker-compose")]
