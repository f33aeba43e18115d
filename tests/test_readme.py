"""Every block of the README is run: shell blocks in order against a service that `make run` started."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from examples.local_provider import LocalProvider
from ktrdr_budget import Budget

from .helpers.guarded import cost_nanos

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(TEXT) if name == language]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all files that git does not ignore; its `.venv` is the environment of this test run."""
    target = Path(tmp_path_factory.mktemp("clone")) / "ktrdr-budget"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    binaries = target / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for tool in Path(sys.executable).parent.iterdir():
        if tool.name != "activate":
            (binaries / tool.name).symlink_to(tool)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    for stamp in (".made", ".run", ".test"):
        (target / ".venv" / stamp).touch()
    return target


@pytest.fixture(scope="module")
def service(clone: Path) -> Iterator[int]:
    """Start `make run`, wait until the service is ready, and yield the port."""
    port = free_port()
    process = subprocess.Popen(
        ["make", "run", f"PORT={port}"],
        cwd=clone,
        env=environment(port),
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    try:
        ends = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=30) as answer:
                    assert answer.status == 200
                    break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                assert time.monotonic() < ends
                time.sleep(0.05)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)


def environment(port: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AGENT_", "KTRDR_"))}
    return {**kept, "KTRDR_API_URL": f"http://127.0.0.1:{port}", "NO_COLOR": "1"}


@pytest.mark.slow
def test_every_shell_block_in_the_readme_runs_and_prints_what_the_readme_shows(clone: Path, service: int):
    [run, test, *others] = blocks("sh")
    assert run == "make run\n"  # the fixture has done so
    assert test == "make test\n"  # this is it; that the target exists:
    subprocess.run(["make", "-n", "test"], cwd=clone, check=True, capture_output=True, env=environment(service))
    shown = ""
    for block in others:
        script = "set -euo pipefail\n. .venv/bin/activate\n" + block.replace("127.0.0.1:8000", f"127.0.0.1:{service}")
        done = subprocess.run(
            ["bash", "-c", script], cwd=clone, capture_output=True, text=True, env=environment(service)
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        shown += done.stdout
    [status] = [text for text in blocks("text") if text.startswith("Agent Budget Status")]
    assert re.sub(r"Date: .*", "", status) in re.sub(r"Date: .*", "", shown)
    assert "$10.00" in shown
    assert '"state":"committed"' in shown
    assert re.search(r'ktrdr_budget_remaining\{budget="agent",unit="usd"\} 4\.84', shown)


def test_the_library_example_in_the_readme_runs(tmp_path: Path):
    [block, _] = blocks("python")
    done = subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "4.93\n"), done.stderr


def test_the_guarded_client_in_the_readme_commits_the_amount_that_the_provider_billed(tmp_path: Path):
    [_, block] = blocks("python")
    with LocalProvider() as provider:
        environment = {**os.environ, "ANTHROPIC_BASE_URL": provider.anthropic_url, "ANTHROPIC_API_KEY": "local"}
        words = [sys.executable, "-W", "error", "-c", block]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        [billed] = provider.ledger
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f" ${Decimal(cost_nanos(billed)).scaleb(-9).normalize()}\n"), done.stdout


def test_the_example_budgets_file_in_the_readme_is_valid():
    [block] = blocks("toml")
    budgets = [Budget(**entry) for entry in tomllib.loads(block)["budgets"]]
    assert [budget.name for budget in budgets] == ["team:quant", "cycles"]


def test_every_link_in_the_documents_has_an_existing_target():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8")):
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{document.name}: {path}#{anchor}"


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(
        r"^#+ (.*)", re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
