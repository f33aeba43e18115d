"""Derive ``ktrdr_budget/sync.py`` from the async limiter, hold and lease.

``python scripts/generate_sync.py`` writes it; with ``--check`` it exits with 1 if the file is out of date.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ktrdr_budget"
TARGET = PACKAGE / "sync.py"
SOURCES = {"hold.py": "AsyncHold", "lease.py": "AsyncLease", "limiter.py": "AsyncBudgetLimiter"}
WORDS = {
    "AsyncBudgetLimiter": "BudgetLimiter",
    "AsyncHold": "Hold",
    "AsyncIterator": "Iterator",
    "AsyncLease": "Lease",
    "AsyncRunner": "SyncRunner",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "asynccontextmanager": "contextmanager",
}
ONE_LOOP = "It belongs to the\n    event loop of its first use. Calls"
ANY_THREAD = "Threads may\n    share it. Calls"
HEADER = '''"""The synchronous limiter. Derived from the asynchronous one by ``scripts/generate_sync.py``: do not edit.

A test checks that it is up to date.
"""

from __future__ import annotations

'''
PUBLIC = "__all__ = ['BudgetLimiter', 'Hold', 'Lease']"


def imports_of(tree: ast.Module) -> list[str]:
    """The imports of a module, without the classes that the target derives."""
    found = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__":
            node.names = [alias for alias in node.names if alias.name not in SOURCES.values()]
            if node.names:
                found.append(ast.unparse(node))
    return found


def derived() -> str:
    """The text of the target."""
    imports, classes = ["from ktrdr_budget.limiter import LimiterBase, _execute, logger"], []
    for name, wanted in SOURCES.items():
        text = (PACKAGE / name).read_text(encoding="utf-8")
        tree = ast.parse(text)
        [found] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == wanted]
        classes.append(str(ast.get_source_segment(text, found)))
        imports += imports_of(tree)
    body = "\n\n\n".join(classes)
    assert ONE_LOOP in body
    text = "\n".join(imports) + f"\n\n{PUBLIC}\n\n\n" + body.replace(ONE_LOOP, ANY_THREAD)
    text = re.sub(r"\basync (def|with)\b", r"\1", text)
    text = re.sub(r"\(await (.+)\)\[0\]", r"\1[0]", text)
    text = re.sub(r"\bawait ", "", text)
    text = re.sub("|".join(rf"\b{word}\b" for word in WORDS), lambda found: WORDS[found[0]], text)
    text = HEADER + text.replace("ktrdr_budget.engine.runner import", "ktrdr_budget.engine.portal import")
    for arguments in (["check", "--fix", "--exit-zero", "--quiet", "--select", "F401,F811,I"], ["format", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", str(TARGET), "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return text


def main() -> int:
    """Write the target, or check it."""
    text = derived()
    if sys.argv[1:] != ["--check"]:
        TARGET.write_text(text, encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != text:
        sys.stderr.write(f"{TARGET.name} is out of date: run scripts/generate_sync.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
