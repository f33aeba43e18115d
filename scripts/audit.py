"""Check every installed package for known vulnerabilities; run by `make audit`.

Exit codes: 0 no known vulnerability, 1 some, 2 the auditor failed, 3 unknown: a package could not be looked up, because
the advisory service is unreachable or has no record of it. Unknown does not mean "none".
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
    """Run the auditor and report its findings; return the exit code."""
    parser = argparse.ArgumentParser(prog="audit", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("auditor", help="the pip-audit program")
    parser.add_argument("--path", default=sysconfig.get_path("purelib"), help="packages (default: this environment)")
    parser.add_argument("--timeout", type=int, default=15, metavar="SECONDS", help="timeout of one look-up")
    given = parser.parse_args(arguments)
    words = [given.auditor, "--path", given.path, "--skip-editable", "--format", "json", "--aliases", "on"]
    words += ["--desc", "off", "--progress-spinner", "off", "--timeout", str(given.timeout)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError, TypeError):
        lines = done.stderr.strip().splitlines() or ["no output"]
        return _ended(lines[-1], done.stderr)
    return _report(packages)


def _ended(line: str, words: str) -> int:
    """Report a run without results: a network error, or a failure of the auditor."""
    signs = ("ConnectionError", "ConnectTimeout", "ServiceError", "Max retries", "HTTPError")
    if any(sign in words for sign in signs):
        _say(f"advisory service unreachable, result unknown: {line}")
        return UNKNOWN
    _say(f"auditor failed: {line}")
    return FAILED


def _report(packages: Sequence[dict[str, Any]]) -> int:
    vulnerable = [package for package in packages if package.get("vulns")]
    # The project itself is not published, so it has no advisories.
    skipped = [each["name"] for each in packages if "skip_reason" in each and "editable" not in each["skip_reason"]]
    for package in vulnerable:
        for found in package["vulns"]:
            names = ", ".join([found["id"], *found.get("aliases", [])])
            fixed = ", ".join(found.get("fix_versions", [])) or "no version"
            sys.stdout.write(f"{package['name']} {package['version']}: {names}; fixed in {fixed}\n")
    audited = len(packages) - len(skipped)
    if skipped:
        names = ", ".join(skipped[:_SHOWN_MAX]) + (", …" if len(skipped) > _SHOWN_MAX else "")
        why = "advisory service unreachable" + (" or without a record of them" if audited else "")
        _say(f"{len(skipped)} of {len(packages)} packages could not be looked up ({names}): {why}")
    _say(f"{len(vulnerable)} of {audited} packages looked up have known vulnerabilities")
    return SOME if vulnerable else UNKNOWN if skipped else NONE


def _say(line: str) -> None:
    sys.stderr.write(f"audit: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
