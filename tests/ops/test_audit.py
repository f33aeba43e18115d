"""`make audit`: reports and exit codes for each result of the auditor, which is emulated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .files import ROOT

FINE = {"name": "redis", "version": "8.1.0", "vulns": []}
SKIPPED = {"name": "tzdata", "skip_reason": "Dependency not found on PyPI and could not be audited: tzdata (2026.1)"}
VULNERABLE = {
    "name": "urllib3",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-2023-1", "aliases": ["CVE-2023-1"], "fix_versions": ["1.26.17", "2.0.6"]}],
}


def audit(tmp_path: Path, packages: list[dict[str, Any]] | None, complaint: str = "") -> tuple[int, str, str]:
    auditor = tmp_path / "pip-audit"
    answer = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
    auditor.write_text(f"#!{sys.executable}\nimport sys\nprint({answer!r})\nprint({complaint!r}, file=sys.stderr)\n")
    auditor.chmod(0o755)
    words = [sys.executable, str(ROOT / "scripts" / "audit.py"), str(auditor)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_audit_target_has_exit_code_0_if_no_dependency_has_a_known_vulnerability(tmp_path):
    assert audit(tmp_path, [FINE]) == (0, "", "audit: 0 of 1 packages looked up have known vulnerabilities\n")


def test_the_audit_target_prints_each_vulnerability_with_its_fix_and_has_exit_code_1(tmp_path):
    code, stdout, stderr = audit(tmp_path, [FINE, VULNERABLE, SKIPPED])
    assert (code, stdout) == (1, "urllib3 1.0: PYSEC-2023-1, CVE-2023-1; fixed in 1.26.17, 2.0.6\n")
    assert "1 of 2 packages looked up have known vulnerabilities" in stderr


@pytest.mark.parametrize("packages", [[FINE, SKIPPED], [SKIPPED]])
def test_the_audit_target_has_exit_code_3_if_a_package_cannot_be_looked_up(tmp_path, packages):
    code, _, stderr = audit(tmp_path, packages)
    assert code == 3
    assert f"1 of {len(packages)} packages could not be looked up (tzdata): advisory service unreachable" in stderr


def test_the_audit_target_does_not_look_up_the_project_itself(tmp_path):
    own = {"name": "ktrdr-budget", "skip_reason": "distribution marked as editable"}
    assert audit(tmp_path, [FINE, own])[0] == 0


def test_the_audit_target_has_different_exit_codes_for_a_network_error_and_a_failed_auditor(tmp_path):
    code, _, stderr = audit(tmp_path, None, "ERROR:pip_audit._cli:ConnectionError: Max retries exceeded")
    assert (code, "advisory service unreachable, result unknown" in stderr) == (3, True)
    code, _, stderr = audit(tmp_path, None, "ImportError: no module")
    assert (code, stderr) == (2, "audit: auditor failed: ImportError: no module\n")


def test_the_help_target_lists_the_audit_target_and_the_makefile_pins_the_version_of_the_auditor():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "pip-audit==" in makefile
    assert "make audit" in subprocess.check_output(["make", "--no-print-directory", "help"], cwd=ROOT, text=True)
