"""A text that is shown again and again: in one place where a person looks, line by line where nobody does."""

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
"""Gives a document of the service's, and its text for a person."""


def show(ask: Ask, as_json: bool, *, interval_s: float | None = None) -> None:
    """Shows what ``ask`` gives: once, or at each interval until Ctrl-C, which is the way to end it well.

    A service that cannot be reached at first is an error. Later, its last figures are taken away, and the error stands
    in their place until it answers again.
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
                    screen.draw(text, f"At {clock()}, again every {interval_s:g} s; Ctrl-C ends it.")
            time.sleep(interval_s)
    except KeyboardInterrupt:
        if screen.redraws:
            write("")  # the terminal has just shown ^C


def draw_unknown(screen: Screen, error: Unreachable, since: str, as_json: bool) -> None:
    """Says that nothing is known: in the place of the last figures, or on stderr."""
    if screen.redraws and not as_json:
        screen.draw(f"Unknown since {since}: {one_line(error.message)}")
    else:
        error.show()


def clock() -> str:
    """The time of day."""
    return time.strftime("%H:%M:%S")


class Screen:
    """Draws each text over the one before it; without a terminal, below it."""

    def __init__(self) -> None:
        self.redraws = is_terminal()
        self._lines: list[str] = []

    def draw(self, text: str, note: str = "") -> None:
        """Shows a text in the place of the last one; the note only where it will be replaced."""
        if not self.redraws:
            write(f"\n{text}" if self._lines else text)
            self._lines = [text]
            return
        lines = [*text.splitlines(), *([note] if note else [])]
        # One write, each line cleared from its end: nothing flickers.
        write(self._back() + "\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J")
        self._lines = [click.unstyle(line) for line in lines]

    def _back(self) -> str:
        """The way to where the last text began; if that has wrapped or scrolled away, a cleared screen."""
        columns, rows = os.get_terminal_size(sys.stdout.fileno())  # not COLUMNS, which a resized terminal leaves behind
        if len(self._lines) >= rows or any(len(line) > columns for line in self._lines):
            return "\x1b[2J\x1b[H"
        return f"\x1b[{len(self._lines)}A\r" if self._lines else ""
