"""``ktrdr agent``: the agent's daily budget at a glance."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import click

from ktrdr_budget.cli.arguments import seconds_from
from ktrdr_budget.cli.client import Service, service, understood
from ktrdr_budget.cli.errors import Unreachable
from ktrdr_budget.cli.output import amount_text, is_terminal, one_line, paint, write, write_json

__all__ = ["agent"]

_SEPARATOR = "=" * 30
_BAR_CELLS = 30
_SCARCE = Decimal("0.25")
"""Below this share of the limit, what remains is shown as scarce."""


@click.group()
def agent() -> None:
    """The agent's daily budget."""


@agent.command("budget")
@click.option("--json", "as_json", is_flag=True, help="The service's JSON; with --watch one line each time.")
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option(
    "--interval",
    metavar="SECONDS",
    default=2.0,
    callback=seconds_from(0.1),
    show_default=True,
    help="How often --watch asks.",
)
def agent_budget(as_json: bool, watch: bool, interval: float) -> None:
    """Show what today's budget has spent and what remains.

    Money is exact: two decimals, and more where there are more. The exit code is 0 also when nothing remains.
    """
    where = service()
    if watch:
        _watch(where, interval, as_json)
        return
    document, text = _ask(where)
    if as_json:
        write_json(document)
    else:
        write(text)


def _ask(where: Service) -> tuple[dict[str, Any], str]:
    """The service's JSON, and the same for a person."""
    answer = where.get("/agent/budget")
    with understood(where):
        return answer.document, status_text(answer.exact)


def status_text(status: Mapping[str, Any]) -> str:
    """The status in its fixed form; on a terminal with a bar.

    Raises:
        LookupError, TypeError, ValueError, ArithmeticError: not the status of a daily budget.
    """
    lines = ["Agent Budget Status", _SEPARATOR, f"Date: {one_line(status['date'])}"]
    lines.append(f"Daily Limit: {_money(status['daily_limit'])}")
    lines.append(f"Today's Spend: {_money(status['today_spend'])}")
    lines += [f"{title}: {_money(status[name])}" for title, name in _PARTS if status[name]]
    lines.append(f"Remaining: {_money(status['remaining'])}")
    cycles = status["cycles_affordable"]
    lines.append(f"Cycles Affordable: {'unlimited' if cycles is None else f'~{int(cycles)}'}")
    if is_terminal() and status["daily_limit"]:
        lines.append(_bar(*(Decimal(status[name]) for name in ("daily_limit", "today_spend", "unconfirmed", "held"))))
    return "\n".join(lines)


_PARTS = (("Held", "held"), ("Unconfirmed", "unconfirmed"))


def _money(value: Any) -> str:
    return amount_text(value, is_money=True)


def _bar(limit: Decimal, spent: Decimal, unconfirmed: Decimal, held: Decimal) -> str:
    """Spent, unconfirmed, held and free parts of the limit, and how much of it is used."""
    used = spent + unconfirmed + held
    marks = "█▓▒·" if _can_show("█▓▒·") else "#=-."
    widths = _cells((spent, unconfirmed, held), limit)
    left = limit - used
    color = "red" if left <= 0 else "yellow" if left < limit * _SCARCE else "green"
    segments = [mark * width for mark, width in zip(marks, [*widths, _BAR_CELLS - sum(widths)], strict=True)]
    percent = int(used * 100 / limit)
    shown = "<1%" if used and not percent else f"{percent}%"
    return f"[{paint(''.join(segments[:3]), fg=color)}{segments[3]}] {shown} used"


def _cells(parts: tuple[Decimal, ...], limit: Decimal) -> list[int]:
    """How many cells each part fills: at least one if it is not zero, and not all while something remains."""
    total = sum(parts)
    room = _BAR_CELLS if total >= limit else _BAR_CELLS - 1
    scale = max(limit, total)
    cells = [min(room, max(1, int(part * _BAR_CELLS / scale))) if part else 0 for part in parts]
    while sum(cells) > room:
        cells[cells.index(max(cells))] -= 1
    if total >= limit:
        cells[cells.index(max(cells))] += room - sum(cells)
    return cells


def _can_show(marks: str) -> bool:
    try:
        marks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _watch(where: Service, interval_s: float, as_json: bool) -> None:
    """Shows the status until Ctrl-C, which is the way to end it well.

    A service that cannot be reached at first is an error. Later, its last figures are taken away, and the error stands
    in their place until it answers again.
    """
    screen = _Screen()
    answered, unknown_since = False, ""
    try:
        while True:
            try:
                document, text = _ask(where)
            except Unreachable as error:
                if not answered:
                    raise
                unknown_since = unknown_since or _clock()
                _draw_unknown(screen, error, unknown_since, as_json)
            else:
                answered, unknown_since = True, ""
                if as_json:
                    write_json(document, compact=True)
                else:
                    screen.draw(text, f"At {_clock()}, again every {interval_s:g} s; Ctrl-C ends it.")
            time.sleep(interval_s)
    except KeyboardInterrupt:
        if screen.redraws:
            write("")  # the terminal has just shown ^C


def _draw_unknown(screen: _Screen, error: Unreachable, since: str, as_json: bool) -> None:
    if screen.redraws and not as_json:
        screen.draw(f"Unknown since {since}: {one_line(error.message)}")
    else:
        error.show()


def _clock() -> str:
    return time.strftime("%H:%M:%S")


class _Screen:
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
