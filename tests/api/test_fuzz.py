"""A property-based HTTP fuzzer sends requests to the live service: no 5xx, no undocumented response, no wrong schema.

The fuzzer is a separate process. It prints its random seed, and for each failure a request that repeats the failure.
Two of the fuzzer's checks are left out, because the service cannot satisfy them:

- ``positive_data_acceptance``: whether an amount is valid depends on its budget. Whether a cursor or a window exists
  depends on the stored data.
- ``ensure_resource_availability``: the reply is 404 for an existing hold if the hold lacks the requested budget.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .processes import ServiceProcess, serving
from .support import BUDGETS

UNMET = "positive_data_acceptance,ensure_resource_availability"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def budgets(tmp_path: Path) -> Path:
    """Budgets of every kind."""
    path = tmp_path / "budgets.toml"
    path.write_text(BUDGETS)
    return path


@pytest.fixture
def service(server, budgets: Path) -> Iterator[ServiceProcess]:
    with serving(
        KTRDR_REDIS_URL=server.url, KTRDR_BUDGETS_FILE=budgets, KTRDR_API_KEY="use", KTRDR_ADMIN_KEY="admin"
    ) as service:
        yield service


def fuzz(
    service: ServiceProcess, directory: Path, *options: str, key: str, unmet: str = UNMET, examples: int = 15
) -> None:
    for seconds in (11, 40, 100):  # a busy machine may need longer to reach every operation
        output = _fuzzed(service, directory, *options, key=key, unmet=unmet, examples=examples, seconds=seconds)
        if re.search(r"Selected: (\d+)/\1\s+Tested: \1\b", output):
            return
    raise AssertionError(output[-20_000:])


def _fuzzed(
    service: ServiceProcess, directory: Path, *options: str, key: str, unmet: str, examples: int, seconds: int
) -> str:
    """Run the fuzzer, check that the fuzzer finds no fault, and return its output."""
    schema = directory / "openapi.json"
    schema.write_text(service.get("/openapi.json").text)
    words = [sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", service.url, "--no-color"]
    words += ["--header", f"Authorization: Bearer {key}", "--max-examples", str(examples), "--max-time", str(seconds)]
    words += ["--request-timeout", "120"]  # the machine may be busy
    words += ["--exclude-checks", unmet, "--suppress-health-check", "all", *options]
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    return done.stdout


@pytest.mark.parametrize("key", ["admin", "use"])
def test_every_response_matches_the_openapi_document(service, tmp_path, key):
    fuzz(service, tmp_path, key=key)


def test_every_response_matches_the_openapi_document_while_the_store_is_down(start_server, budgets, tmp_path):
    own = start_server()
    environment = {"KTRDR_REDIS_URL": own.url, "KTRDR_BUDGETS_FILE": budgets, "KTRDR_TIMEOUT": "0.02"}
    with serving(**environment, KTRDR_ADMIN_KEY="admin") as service:
        own.kill()
        # Only the check for server errors is off: 503 is expected.
        fuzz(
            service,
            tmp_path,
            "--phases",
            "examples,fuzzing",
            key="admin",
            unmet=f"{UNMET},not_a_server_error",
            examples=5,
        )
