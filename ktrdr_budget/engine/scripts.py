"""Loads the Lua scripts of ``lua/``: from the wheel, an editable install or a checkout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

__all__ = ["CYCLES", "LIMITS", "STATUS", "VERIFY", "Script", "script", "script_for"]

_PARTS = {
    # The write script, for batches of reservations, of simple commits, of settlements, and of anything.
    "reserve": ("prelude", "admission", "reserve", "apply"),
    "commit": ("prelude", "commit", "apply"),
    "settle": ("prelude", "holds", "commit", "settle", "apply"),
    "apply": ("prelude", "admission", "holds", "reserve", "commit", "settle", "record", "extend", "retire", "apply"),
    "status": ("status",),
    "limits": ("limits",),
    "verify": ("verify",),
    "cycles": ("cycles",),
}
_ALONE = {"R": "reserve", "C": "commit", "D": "settle", "L": "settle", "M": "settle"}
STATUS, LIMITS, VERIFY, CYCLES = "status", "limits", "verify", "cycles"


@dataclass(frozen=True, slots=True)
class Script:
    """A script's source, and the SHA-1 digest by which the store knows it once it is loaded."""

    name: str
    source: str
    sha: str


def script_for(letters: set[str]) -> str:
    """The smallest write script that knows these operations."""
    if len(letters) == 1:
        return _ALONE.get(next(iter(letters)), "apply")
    return "settle" if letters <= {"C", "D", "L", "M"} else "apply"


@cache
def script(name: str) -> Script:
    """The script of this name, put together from its parts."""
    source = "\n".join(_read(part) for part in _PARTS[name])
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def _read(part: str) -> str:
    packaged = files("ktrdr_budget").joinpath("lua", f"{part}.lua")
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parents[2] / "lua" / f"{part}.lua").read_text(encoding="utf-8")
