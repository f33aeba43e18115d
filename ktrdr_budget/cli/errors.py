"""What a command can end with, other than well: one line on stderr, and an exit code.

::

    click.ClickException
    └── CommandError       1  an error
        ├── InvalidInput   2  the service, or the environment, does not take what was given
        ├── Denied         3  a budget has no room
        └── Unreachable    4  the service, or its store, gives no answer
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import IO, Any

import click

from ktrdr_budget.cli.output import one_line, write

__all__ = ["CommandError", "Denied", "InvalidInput", "Unreachable"]


class CommandError(click.ClickException):
    """An error that is told in one line."""

    exit_code = 1
    prefix = "ktrdr: "

    def __init__(self, message: str, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.problem = problem
        """The problem document, if the service has answered with one."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Writes the line to stderr, or to ``file``."""
        write(self.prefix + one_line(self.format_message()), file or sys.stderr)


class InvalidInput(CommandError):
    """What was given is not usable."""

    exit_code = 2


class Denied(CommandError):
    """A budget has no room; nothing was reserved. ``problem`` has the figures, ``fits`` and ``retry_after``."""

    exit_code = 3
    prefix = "denied: "


class Unreachable(CommandError):
    """The service or its store gave no answer, or broke it off."""

    exit_code = 4
