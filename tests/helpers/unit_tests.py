"""Selection of unit tests, which ``make check`` runs: they start no server and no other process."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

STARTING_FIXTURES = {"start_server", "start_clocked_server", "process", "terminal"}
PACKAGES = ("tests", "ktrdr_budget", "benchmarks", "scripts")


def is_unit_test(item: pytest.Item) -> bool:
    """Whether a test starts no process, by its fixtures and imports, and is not marked ``slow`` or ``server``."""
    if item.get_closest_marker("slow") or item.get_closest_marker("server"):
        return False
    module = getattr(item, "module", None)
    return not STARTING_FIXTURES.intersection(getattr(item, "fixturenames", ())) and not _uses_subprocess(module)


def _uses_subprocess(module: ModuleType | None) -> bool:
    """Whether a test module imports ``subprocess``, directly or through other modules of this repository."""
    waiting, seen = [module], set()
    while waiting:
        current = waiting.pop()
        if current is None or current.__name__ in seen:
            continue
        if subprocess in vars(current).values():
            return True
        seen.add(current.__name__)
        if current.__name__.startswith("ktrdr_budget"):  # imports of the product are not followed: it has lazy ones
            continue
        for value in vars(current).values():
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
            if name.split(".")[0] in PACKAGES and not name.endswith("conftest"):
                waiting.append(sys.modules.get(name))
    return False
