"""Errors of the commands: one line on stderr and an exit code.

::

    click.ClickException
    └── CommandError       1  an error
        ├── InvalidInput   2  the service or the environment rejects the input
        ├── Denied         3  a budget cannot cover the request
        └── Unreachable    4  no reply from the service or its store
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import IO, Any

import click

from ktrdr_budget.cli.output import one_line, write

__all__ = ["CommandError", "Denied", "InvalidInput", "Unreachable"]


class CommandError(click.ClickException):
    """An error that the command reports as one line."""

    exit_code = 1
    prefix = "ktrdr: "

    def __init__(self, message: str, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.problem = problem
        """The problem document in the service's reply, or ``None`` if the error has no such document."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the line to stderr, or to ``file``."""
        write(self.prefix + one_line(self.format_message()), file or sys.stderr)


class InvalidInput(CommandError):
    """The input is invalid."""

    exit_code = 2


class Denied(CommandError):
    """A budget cannot cover the request. ``problem`` is the problem document with the figures of the budget."""

    exit_code = 3
    prefix = "denied: "


class Unreachable(CommandError):
    """The service or its store did not reply, or closed the connection."""

    exit_code = 4
