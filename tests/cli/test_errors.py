"""Errors of the commands: one line, and an exit code for each kind."""

from __future__ import annotations

import io

import pytest

from ktrdr_budget.cli.errors import CommandError, Denied, InvalidInput, Unreachable


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (CommandError("no such hold"), 1, "ktrdr: no such hold\n"),
        (InvalidInput("no such hold"), 2, "ktrdr: no such hold\n"),
        (Denied("budget agent has no room"), 3, "denied: budget agent has no room\n"),
        (Unreachable("no reply"), 4, "ktrdr: no reply\n"),
    ],
)
def test_each_kind_of_error_is_shown_in_one_line_with_a_different_exit_code(
    error: CommandError, exit_code: int, line: str
) -> None:
    shown = io.StringIO()
    error.show(shown)
    assert (error.exit_code, shown.getvalue()) == (exit_code, line)


def test_an_error_is_shown_on_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    CommandError("no such hold").show()
    assert tuple(capsys.readouterr()) == ("", "ktrdr: no such hold\n")


def test_line_breaks_and_escape_sequences_are_removed_from_an_error_message() -> None:
    shown = io.StringIO()
    CommandError("first\nsecond \x1b[31m").show(shown)
    assert shown.getvalue() == "ktrdr: first second ?[31m\n"


def test_a_denial_contains_the_problem_document_of_the_service() -> None:
    problem = {"code": "denied", "remaining": "0.05"}
    assert Denied("budget agent has no room", problem).problem == problem
    assert CommandError("no such hold").problem is None
