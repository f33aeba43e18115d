"""Looks up the known vulnerabilities of every installed package: what `make audit` runs.

Exit codes: 0 none is known, 1 some are, 2 the auditor failed, 3 unknown: some package could not be looked up, because
the advisory service is out of reach or does not know it. Unknown is not "none".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from typing import Any

NONE, SOME, FAILED, UNKNOWN = 0, 1, 2, 3
_SHOWN_MAX = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the auditor, and says what it has found; the exit code."""
    parser = argparse.ArgumentParser(prog="audit", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("auditor", help="the pip-audit program")
    parser.add_argument("--path", default=sysconfig.get_path("purelib"), help="packages (default: of this environment)")
    parser.add_argument("--timeout", type=int, default=15, metavar="SECONDS", help="of one look-up")
    given = parser.parse_args(arguments)
    words = [given.auditor, "--path", given.path, "--skip-editable", "--format", "json", "--aliases", "on"]
    words += ["--desc", "off", "--progress-spinner", "off", "--timeout", str(given.timeout)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError, TypeError):
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        return _ended(lines[-1], done.stderr)
    return _told(packages)


def _ended(line: str, words: str) -> int:
    """Without any result: because nobody could be asked, or for another reason."""
    signs = ("ConnectionError", "ConnectTimeout", "ServiceError", "Max retries", "HTTPError")
    if any(sign in words for sign in signs):
        _say(f"the advisory service cannot be reached, nothing is known: {line}")
        return UNKNOWN
    _say(f"the auditor failed: {line}")
    return FAILED


def _told(packages: Sequence[dict[str, Any]]) -> int:
    vulnerable = [package for package in packages if package.get("vulns")]
    # The project itself is not published, so nobody can have written about it.
    skipped = [each["name"] for each in packages if "skip_reason" in each and "editable" not in each["skip_reason"]]
    for package in vulnerable:
        for found in package["vulns"]:
            names = ", ".join([found["id"], *found.get("aliases", [])])
            fixed = ", ".join(found.get("fix_versions", [])) or "no version"
            sys.stdout.write(f"{package['name']} {package['version']}: {names}; fixed in {fixed}\n")
    audited = len(packages) - len(skipped)
    if skipped:
        names = ", ".join(skipped[:_SHOWN_MAX]) + (", …" if len(skipped) > _SHOWN_MAX else "")
        why = "the advisory service cannot be reached" + (" or does not know them" if audited else "")
        _say(f"{len(skipped)} of {len(packages)} packages could not be looked up ({names}): {why}")
    _say(f"{len(vulnerable)} of {audited} packages that were looked up have known vulnerabilities")
    return SOME if vulnerable else UNKNOWN if skipped else NONE


def _say(line: str) -> None:
    sys.stderr.write(f"audit: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
