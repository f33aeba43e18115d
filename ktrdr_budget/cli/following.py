"""Follows one research cycle until it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from ktrdr_budget.cli.client import Service, expect_valid_response
from ktrdr_budget.cli.cycle_texts import ending, has_ended, milestones, picture
from ktrdr_budget.cli.errors import CommandError, Unreachable
from ktrdr_budget.cli.output import is_terminal, write, write_json
from ktrdr_budget.cli.screen import Screen, clock, draw_unknown

__all__ = ["follow"]

PATIENCE_S = 60.0
"""A service that does not answer for longer is given up: a script must come to an end."""


def follow(where: Service, operation_id: str, interval_s: float, as_json: bool) -> None:
    """Shows the phases of a cycle until it has ended: drawn in one place on a terminal, else a line for each step.

    Raises:
        CommandError: it failed or was cancelled, or the service does not know it any more.
        Unreachable: the service gave no answer for a minute.
        click.Abort: Ctrl-C; the cycle goes on.
    """
    view = _View(as_json)
    try:
        cycle = _until_ended(where, operation_id, interval_s, view)
    except KeyboardInterrupt:
        if is_terminal():
            write("")  # the terminal has just shown ^C
        words = f"stopped waiting; the cycle goes on ('ktrdr agent cancel {operation_id}' ends it)"
        CommandError(words).show()
        raise click.Abort from None
    if cycle["outcome"] != "completed":
        raise CommandError(f"{operation_id} {ending(cycle)}")


def _until_ended(where: Service, operation_id: str, interval_s: float, view: _View) -> Mapping[str, Any]:
    answered_at = time.monotonic()
    while True:
        try:
            cycle = _find(where, operation_id)
        except Unreachable as error:
            if time.monotonic() - answered_at > PATIENCE_S:
                raise Unreachable(f"{error.message}; {operation_id} may still be running") from None
            view.unknown(error)
        else:
            answered_at = time.monotonic()
            with expect_valid_response(where):
                view.draw(cycle)
                if has_ended(cycle):
                    return cycle
        time.sleep(interval_s)


def _find(where: Service, operation_id: str) -> dict[str, Any]:
    """The cycle: among those of now, or among the recent ones.

    Raises:
        CommandError: it is in neither.
    """
    for path in ("/agent/status", "/agent/cycles"):
        answer = where.get(path)
        with expect_valid_response(where):
            cycles = _cycles(answer.document)
            if operation_id in cycles:
                return cycles[operation_id]  # type: ignore[no-any-return]
    raise CommandError(f"the service does not know {operation_id} any more")


def _cycles(document: Mapping[str, Any]) -> dict[str, Any]:
    """By id, whichever of the two documents it is."""
    found = document["cycles"] if "cycles" in document else [*document["active_cycles"], document["last_cycle"]]
    return {cycle["operation_id"]: cycle for cycle in found if cycle is not None}


class _View:
    """Shows a cycle as it goes on: each step once, or the picture of it again and again."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._screen = Screen()
        self._told: set[str] = set()
        self._unknown_since = ""

    def draw(self, cycle: Mapping[str, Any]) -> None:
        """Shows what is new in it."""
        self._unknown_since = ""
        if self._screen.redraws and not self._as_json:
            note = "" if has_ended(cycle) else "Ctrl-C ends the waiting, not the cycle."
            self._screen.draw(picture(cycle), note)
            return
        new = [line for line in milestones(cycle) if line not in self._told]
        self._told.update(new)
        if self._as_json:
            if new or has_ended(cycle):
                write_json(cycle, compact=True)
            return
        for line in new:
            write(line)
        if has_ended(cycle):
            write(ending(cycle))

    def unknown(self, error: Unreachable) -> None:
        """Says once that the service is away; on a terminal, for as long as it is."""
        first, self._unknown_since = not self._unknown_since, self._unknown_since or clock()
        if first or (self._screen.redraws and not self._as_json):
            draw_unknown(self._screen, error, self._unknown_since, self._as_json)
