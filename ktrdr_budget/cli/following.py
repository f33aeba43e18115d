"""``ktrdr agent trigger --wait``: follow a research cycle until it ends."""

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
"""If the service does not reply for this number of seconds, the command fails, so that a script does not hang."""


def follow(where: Service, operation_id: str, interval_s: float, as_json: bool) -> None:
    """Show the progress of a cycle until the cycle ends. On a terminal, redraw in place; else write a line per step.

    Raises:
        CommandError: the cycle failed or was cancelled, or the service has no record of the cycle.
        Unreachable: the service did not reply for a minute.
        click.Abort: the user pressed Ctrl-C. The cycle continues.
    """
    view = _View(as_json)
    try:
        cycle = _until_ended(where, operation_id, interval_s, view)
    except KeyboardInterrupt:
        if is_terminal():
            write("")  # the terminal has just echoed ^C
        words = f"stopped waiting; the cycle continues (stop it with 'ktrdr agent cancel {operation_id}')"
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
    """Find a cycle in the agent's status or, if the status does not have the cycle, in the list of cycles.

    Raises:
        CommandError: the cycle is in neither document.
    """
    for path in ("/agent/status", "/agent/cycles"):
        answer = where.get(path)
        with expect_valid_response(where):
            cycles = _cycles(answer.document)
            if operation_id in cycles:
                return cycles[operation_id]  # type: ignore[no-any-return]
    raise CommandError(f"the service has no record of {operation_id}")


def _cycles(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cycles by id. The document is the agent's status or a list of cycles."""
    found = document["cycles"] if "cycles" in document else [*document["active_cycles"], document["last_cycle"]]
    return {cycle["operation_id"]: cycle for cycle in found if cycle is not None}


class _View:
    """Shows the progress of a cycle: on a terminal, a text that is redrawn; else, each step once."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._screen = Screen()
        self._shown: set[str] = set()
        self._unknown_since = ""

    def draw(self, cycle: Mapping[str, Any]) -> None:
        """Show the steps since the previous call."""
        self._unknown_since = ""
        if self._screen.redraws and not self._as_json:
            note = "" if has_ended(cycle) else "Ctrl-C stops waiting; the cycle continues."
            self._screen.draw(picture(cycle), note)
            return
        new = [line for line in milestones(cycle) if line not in self._shown]
        self._shown.update(new)
        if self._as_json:
            if new or has_ended(cycle):
                write_json(cycle, compact=True)
            return
        for line in new:
            write(line)
        if has_ended(cycle):
            write(ending(cycle))

    def unknown(self, error: Unreachable) -> None:
        """Report that the service is unreachable, once per outage. On a terminal, the report stays until a reply."""
        first, self._unknown_since = not self._unknown_since, self._unknown_since or clock()
        if first or (self._screen.redraws and not self._as_json):
            draw_unknown(self._screen, error, self._unknown_since, self._as_json)
