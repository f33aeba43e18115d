"""The Lua scripts of ``lua/``, loaded from the wheel, an editable install or a checkout."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

__all__ = [
    "CORRECT",
    "CREATE_KEY",
    "CYCLES",
    "FAST_PATH",
    "MIGRATE",
    "PARTS",
    "READ",
    "READ_CHANGES",
    "READ_LEDGER",
    "READINESS",
    "REINDEX",
    "REPAIR",
    "REVOKE_KEY",
    "SET_LIMIT",
    "STATUS",
    "WRITE",
    "Script",
    "read_part",
    "script",
    "script_for",
    "without_script_location",
]

FAST_PATH, WRITE, REPAIR = "fast_path", "write", "repair"
STATUS, READ, READ_LEDGER, READ_CHANGES, READINESS = "status", "read", "read_ledger", "read_changes", "readiness"
SET_LIMIT, MIGRATE, CORRECT, REINDEX, CYCLES = "set_limit", "migrate", "correct", "reindex", "cycles"
CREATE_KEY, REVOKE_KEY = "create_key", "revoke_key"

_BEGIN = ("common", "schema", "prelude")
_SETTLE = ("hold_records", "commit", "release")
_RECOVER = ("restore", "recovery", "settle_on_behalf", "replay_total", "replay_limit")
_WRITE = ("admission", *_SETTLE, "reserve", "record", "extend", "retire")
PARTS = {
    FAST_PATH: ("common", "fast_path"),
    # The next scripts execute batches: of reservations only, of settlements only, of all usual operations, of replays.
    "reserve": (*_BEGIN, "admission", "reserve", "finish"),
    "settle": (*_BEGIN, *_SETTLE, "finish"),
    WRITE: (*_BEGIN, *_WRITE, "finish"),
    "restore": (*_BEGIN, *_WRITE, "restore", "finish"),
    REPAIR: (*_BEGIN, "admission", *_SETTLE, "record", *_RECOVER, "finish"),
    STATUS: ("schema", "read_head", "status"),
    READ: ("schema", "read_head", "read"),
    READ_LEDGER: ("schema", "read_head", "read_ledger"),
    READ_CHANGES: ("schema", "read_head", "read_changes"),
    READINESS: ("readiness",),
    SET_LIMIT: ("log_change", "set_limit"),
    CREATE_KEY: ("log_change", "create_key"),
    REVOKE_KEY: ("log_change", "revoke_key"),
    MIGRATE: ("schema", "migrate"),
    CORRECT: ("correct",),
    REINDEX: ("reindex",),
    CYCLES: ("cycles",),
}
_INCLUDE = re.compile(r"^ *-- include: (\w+)\.lua\n", re.MULTILINE)
_REPAIRING = {"Q", "S", "T"}
_ALONE = {"R": "reserve", "D": "settle", "L": "settle", "K": "restore"}


@dataclass(frozen=True, slots=True)
class Script:
    """The source of a script, and its SHA-1 digest, by which ``EVALSHA`` runs the script."""

    name: str
    source: str
    sha: str


def script_for(letters: set[str], *, repairs: bool = False) -> str:
    """The name of the smallest write script that can execute these operations.

    Args:
        letters: the letters of the operations.
        repairs: whether the operations replay data that the store has lost.
    """
    if repairs or letters & _REPAIRING:
        return REPAIR
    if len(letters) == 1:
        return _ALONE.get(next(iter(letters)), WRITE)
    if letters <= {"D", "L"}:
        return "settle"
    return "restore" if "K" in letters else WRITE


@cache
def script(name: str) -> Script:
    """The script of this name, which is joined from several parts."""
    source = "\n".join(map(read_part, PARTS[name]))
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def without_script_location(error: str) -> str:
    """Remove the script and line number from an error reply."""
    return re.sub(r",? script: [^:]*on @user_script.*", "", error)


def read_part(name: str) -> str:
    """The text of a part. Included parts are inlined, because the call of a Lua function costs time."""
    return _INCLUDE.sub(lambda found: _read(found[1]), _read(name))


def _read(part: str) -> str:
    packaged = files("ktrdr_budget").joinpath("lua", f"{part}.lua")
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parents[3] / "lua" / f"{part}.lua").read_text(encoding="utf-8")
