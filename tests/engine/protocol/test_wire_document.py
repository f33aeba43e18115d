"""`docs/wire.md`, `codes.py` and the headers of `lua/` describe one protocol."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

import pytest

from ktrdr_budget.engine.protocol import codes

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
LETTERS = {name: value for name, value in vars(codes).items() if name.isupper() and isinstance(value, str)}
"""The letter of each name in ``codes.py``."""


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading of ``docs/wire.md``, without backquotes."""
    lines = DOCUMENT[DOCUMENT.index(heading) :].split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[first + 1 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


class Header:
    """The operations, modes and replies that the header of a script lists: the letter of each name, in order."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        lines = text[: text.index("\n\n")].split("\n")
        self.ops: dict[str, str] = {}
        self.modes: dict[str, str] = {}
        self.replies: dict[str, str] = {}
        section: dict[str, str] | None = None
        for line in lines:
            if line.startswith("-- op "):
                section = self.ops
            elif line.startswith("-- reply "):
                section = self.replies
            elif not line.startswith("--        "):
                section = None
            found = re.match(r"--.{8}([A-Z][A-Z_]+) (\S)( |$)", line)
            if found and section is not None:
                section.setdefault(found[1], found[2])
            elif section is self.ops:
                self.modes.update(re.findall(r"\b([A-Z][A-Z_]+) ([a-z0-9])\b", line))


HEADERS = {path.name: Header(path) for path in sorted((ROOT / "lua").glob("*.lua"))}
REQUESTS = table("## Requests")
REPLIES = table("## Replies")
MODES = {
    "The client that releases": codes.ReleaseMode,
    "How a commit": codes.CommitMode,
    "The effect of an extension": codes.ExtendMode,
}


@pytest.mark.parametrize("row", REQUESTS, ids=lambda row: row[1])
def test_wire_md_and_codes_py_and_the_script_have_the_same_letter_for_each_request(row):
    letter, name, script, _, replies = row
    assert LETTERS[name] == letter
    assert HEADERS[script].ops[name] == letter
    assert f"operations.{letter} = " in (ROOT / "lua" / script).read_text(encoding="utf-8") or name == "FAST_COMMIT"
    names = re.findall(r"[A-Z][A-Z_]+", replies)
    if not replies.startswith("as "):
        written = [reply for reply in HEADERS[script].replies if name != "FAST_COMMIT" or reply != "GRANTED"]
        assert [reply for reply in names if reply in LETTERS] == written, "in the same order of precedence"


def test_wire_md_lists_each_operation_of_the_scripts():
    in_scripts = {name for header in HEADERS.values() for name in header.ops}
    assert in_scripts == {name for _, name, *_ in REQUESTS}


def test_wire_md_lists_each_reply_of_the_scripts_with_its_letter():
    assert {name: letter for letter, name, *_ in REPLIES}.items() <= LETTERS.items()
    in_scripts: dict[str, str] = {}
    for script, header in HEADERS.items():
        for name, letter in header.replies.items():
            assert in_scripts.setdefault(name, letter) == letter, script
    assert in_scripts == {name: letter for letter, name, *_ in REPLIES}


def test_no_letter_stands_for_two_requests_or_for_two_replies():
    for rows in (REQUESTS, REPLIES):
        letters = [letter for letter, *_ in rows]
        assert len(set(letters)) == len(letters)


@pytest.mark.parametrize("words", MODES)
def test_wire_md_and_codes_py_and_the_script_have_the_same_letter_for_each_mode(words):
    modes: type[StrEnum] = MODES[words]
    named = {name: letter for letter, name, _ in table(words)}
    assert named == {mode.name: mode.value for mode in modes}
    script = {"ReleaseMode": "release.lua", "CommitMode": "commit.lua", "ExtendMode": "extend.lua"}[modes.__name__]
    assert HEADERS[script].modes == named


def test_wire_md_lists_the_states_policies_and_flags_of_a_hold_record():
    rows = dict(table("## The record of a hold"))
    assert set(re.findall(r"\b([a-z]) [a-z]", rows["state"])) >= set(codes.STATES)
    assert dict(re.findall(r"\b([a-z]) ([a-z]+)", rows["policy"])) == codes.POLICIES
    assert {flag for flag, _ in re.findall(r"\b([a-z]) (dollars|a count|slots)", rows["flag"])} == set(codes.FLAGS)


def test_wire_md_names_every_lua_file_that_is_a_complete_script():
    for path in (ROOT / "lua").glob("*.lua"):
        is_part = path.read_text(encoding="utf-8").startswith(f"-- {path.name} (part): ")
        assert is_part or f"`{path.name}`" in DOCUMENT, path.name
