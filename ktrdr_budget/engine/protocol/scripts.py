"""Loads the Lua scripts of ``lua/``: from the wheel, an editable install or a checkout."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

__all__ = [
    "CORRECT",
    "CYCLES",
    "LIMITS",
    "MIGRATE",
    "READ",
    "READ_LEDGER",
    "READINESS",
    "REINDEX",
    "REPAIR",
    "SIMPLE",
    "STATUS",
    "Script",
    "script",
    "script_for",
    "without_script_location",
]

SIMPLE = "simple"

_WRITES = ("admission", "holds", "reserve", "settle", "record", "extend", "retire")
_PARTS = {
    # What simple.lua knows; and the write script, for batches of reservations, of settlements, and of anything.
    SIMPLE: ("common", "ledger", "simple"),
    "reserve": ("common", "ledger", "prelude", "admission", "reserve", "apply"),
    "settle": ("common", "ledger", "prelude", "holds", "settle", "apply"),
    "apply": ("common", "ledger", "prelude", *_WRITES, "apply"),
    # The same, with holds that were admitted while the store was away, and the slabs that they were granted from.
    "prepaid": ("common", "ledger", "prelude", *_WRITES, "restore", "shrink", "apply"),
    "repair": ("common", "ledger", "prelude", "admission", "holds", "settle", "record", "restore", "repair", "apply"),
    "status": ("read_head", "status"),
    "read": ("read_head", "read"),
    "read_ledger": ("read_head", "read_ledger"),
    "limits": ("limits",),
    "migrate": ("migrate",),
    "correct": ("correct",),
    "readiness": ("readiness",),
    "reindex": ("reindex",),
    "cycles": ("cycles",),
}
_REPAIR = {"Q", "S", "T"}
_ALONE = {"R": "reserve", "D": "settle", "L": "settle", "M": "settle", "H": "prepaid", "P": "prepaid", "K": "prepaid"}
STATUS, READ, READ_LEDGER, LIMITS, CYCLES, REPAIR = "status", "read", "read_ledger", "limits", "cycles", "repair"
CORRECT, REINDEX, READINESS, MIGRATE = "correct", "reindex", "readiness", "migrate"


@dataclass(frozen=True, slots=True)
class Script:
    """A script's source, and the SHA-1 digest by which the store knows it once it is loaded."""

    name: str
    source: str
    sha: str


def script_for(letters: set[str]) -> str:
    """The smallest script with a prelude that knows these operations."""
    if letters & _REPAIR:
        return "repair"
    if len(letters) == 1:
        return _ALONE.get(next(iter(letters)), "apply")
    if letters <= {"D", "L", "M"}:
        return "settle"
    return "prepaid" if letters & {"H", "P", "K"} else "apply"


@cache
def script(name: str) -> Script:
    """The script of this name, put together from its parts."""
    source = "\n".join(_read(part) for part in _PARTS[name])
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def without_script_location(error: str) -> str:
    """An error reply without the script and the line that it came from."""
    return re.sub(r",? script: [^:]*on @user_script.*", "", error)


def _read(part: str) -> str:
    packaged = files("ktrdr_budget").joinpath("lua", f"{part}.lua")
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parents[3] / "lua" / f"{part}.lua").read_text(encoding="utf-8")
