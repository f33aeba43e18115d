"""The commands in the documents are complete."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from ktrdr_budget.cli import main

DOCUMENTS = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
CALL = re.compile(r"`ktrdr ([^`]+)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_command_line_in_the_documents_is_valid(document: Path) -> None:
    for call in CALL.findall(" ".join(document.read_text(encoding="utf-8").split())):
        command: click.Command = main
        words = ["2" if word == "N" else word for word in shlex.split(call)]  # a placeholder for a count
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        try:
            command.make_context(command.name, words)
        except click.UsageError as error:
            pytest.fail(f"{document.name}: ktrdr {call}: {error.format_message()}")
        except click.exceptions.Exit:  # --help
            pass
