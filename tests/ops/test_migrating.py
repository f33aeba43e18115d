"""``docs/migrating.md``: its commands import a day's spend from an old tracker once, and create backups."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ..api.processes import ServiceProcess, serving
from .observers import answering
from .support import ROOT

pytestmark = pytest.mark.slow

TEXT = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
BLOCKS = [
    re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
    for indent, body in re.findall(r"^( *)```sh\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)
]
FROM_FILES, FROM_BACKEND, BACKUP, BACK = BLOCKS


def run(block: str, place: Path, service: ServiceProcess, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AGENT_", "KTRDR_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{block}"],
        cwd=place,
        env={**clean, "PATH": path, "KTRDR_API_URL": service.url, **variables},
        capture_output=True,
        text=True,
    )


def spent(service: ServiceProcess) -> str:
    return str(service.get("/api/v1/budgets/agent").json()["spent"])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The files of a JSON-file tracker in ``data/budget``, with a float total; returns the directory above."""
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    spend = [{"amount": amount, "operation_id": "op_1", "timestamp": f"{day}T00:00:00+00:00"} for amount in (0.1, 0.2)]
    document = {"date": day, "limit": 5.0, "spend": spend, "total_spend": 0.1 + 0.2}
    directory = tmp_path / "data" / "budget"
    directory.mkdir(parents=True)
    (directory / f"{day}.json").write_text(json.dumps(document))
    return tmp_path


def test_the_spend_of_the_old_tracker_is_imported_only_once(server, files: Path):
    old = {"/api/v1/agent/budget": {"today_spend": 0.1 + 0.2, "daily_limit": 5.0, "remaining": 4.7}}
    with serving(KTRDR_REDIS_URL=server.url) as service, answering(old.get) as url:
        for _ in range(2):
            done = run(FROM_FILES, files, service)
            assert done.returncode == 0, done.stderr
            assert "Today's Spend: $0.30\n" in done.stdout
            assert spent(service) == "0.300000001", "rounded up, like any amount"
        done = run(FROM_BACKEND, files, service, OLD_BACKEND=url)
        assert done.returncode == 0, done.stderr
        assert "total of the old tracker" in done.stdout
        assert spent(service) == "0.300000001"
        old["/api/v1/agent/budget"]["today_spend"] = 0.4
        done = run(FROM_BACKEND, files, service, OLD_BACKEND=url)
        assert (done.returncode, spent(service)) == (1, "0.300000001"), "another total is a conflict"


def test_spend_below_one_cent_is_imported_exactly_from_the_old_backend(server, tmp_path: Path):
    old = {"/api/v1/agent/budget": {"today_spend": 0.000001}}
    with serving(KTRDR_REDIS_URL=server.url) as service, answering(old.get) as url:
        done = run(FROM_BACKEND, tmp_path, service, OLD_BACKEND=url)
        assert (done.returncode, spent(service)) == (0, "0.000001"), done.stderr
        done = run(BACK, tmp_path, service)
        assert json.loads(done.stdout)["today_spend"] == 0.000001


def test_a_backup_of_the_embedded_server_contains_the_spend(tmp_path: Path):
    with serving(cwd=tmp_path) as service:
        assert service.post("/api/v1/spend", {"amounts": {"agent": "0.07"}}).status_code == 201
        assert service.stop() == 0
        done = run(BACKUP, tmp_path, service)
        assert done.returncode == 0, done.stderr
    [backup] = (tmp_path / "backup").iterdir()
    restored = tmp_path / "restored"
    with tarfile.open(backup) as archive:
        archive.extractall(restored, filter="data")
    with serving(cwd=restored) as again:
        assert spent(again) == "0.07"


def test_the_migration_document_shows_the_import_of_get_budget_tracker():
    assert "from ktrdr_budget import get_budget_tracker" in TEXT
