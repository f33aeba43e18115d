"""Text that is updated periodically. On a terminal, each text replaces the previous text; else, it is appended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from ktrdr_budget.cli.errors import Unreachable
from ktrdr_budget.cli.output import is_terminal, one_line, write, write_json

__all__ = ["Screen", "clock", "draw_unknown", "show"]


Ask = Callable[[], tuple[dict[str, Any], str]]
"""A function that fetches a document of the service. It returns the document and a text form of the document."""


def show(ask: Ask, as_json: bool, *, interval_s: float | None = None) -> None:
    """Show the result of ``ask`` once. If ``interval_s`` is set, show a new result at each interval until Ctrl-C.

    If the service is unreachable at the first request, the error is raised. If the service becomes unreachable later,
    an error message replaces the figures until the next reply.
    """
    if interval_s is not None:
        _watch(ask, as_json, interval_s)
        return
    document, text = ask()
    if as_json:
        write_json(document)
    else:
        write(text)


def _watch(ask: Ask, as_json: bool, interval_s: float) -> None:
    screen = Screen()
    answered, unknown_since = False, ""
    try:
        while True:
            try:
                document, text = ask()
            except Unreachable as error:
                if not answered:
                    raise
                unknown_since = unknown_since or clock()
                draw_unknown(screen, error, unknown_since, as_json)
            else:
                answered, unknown_since = True, ""
                if as_json:
                    write_json(document, compact=True)
                else:
                    screen.draw(text, f"Updated at {clock()}, every {interval_s:g} s; Ctrl-C to exit.")
            time.sleep(interval_s)
    except KeyboardInterrupt:
        if screen.redraws:
            write("")  # the terminal has just echoed ^C


def draw_unknown(screen: Screen, error: Unreachable, since: str, as_json: bool) -> None:
    """Show the error in place of the figures. With ``as_json``, or without a terminal, write it to stderr."""
    if screen.redraws and not as_json:
        screen.draw(f"Unknown since {since}: {one_line(error.message)}")
    else:
        error.show()


def clock() -> str:
    """Return the local time of day."""
    return time.strftime("%H:%M:%S")


class Screen:
    """Draws each text over the previous text. If stdout is not a terminal, each text is appended."""

    def __init__(self) -> None:
        self.redraws = is_terminal()
        self._lines: list[str] = []

    def draw(self, text: str, note: str = "") -> None:
        """Show a text in place of the previous text. The note appears only on a terminal."""
        if not self.redraws:
            write(f"\n{text}" if self._lines else text)
            self._lines = [text]
            return
        lines = [*text.splitlines(), *([note] if note else [])]
        # One write, with each line cleared to its end, avoids flicker.
        write(self._back() + "\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J")
        self._lines = [click.unstyle(line) for line in lines]

    def _back(self) -> str:
        """Return the sequence that moves the cursor to the start of the previous text.

        If the previous text did not fit on the screen, return the sequence that clears the screen.
        """
        columns, rows = os.get_terminal_size(sys.stdout.fileno())  # not COLUMNS, which is stale after a resize
        if len(self._lines) >= rows or any(len(line) > columns for line in self._lines):
            return "\x1b[2J\x1b[H"
        return f"\x1b[{len(self._lines)}A\r" if self._lines else ""
