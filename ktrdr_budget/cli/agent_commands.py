"""``ktrdr agent``: the agent's daily budget and its research cycles."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from functools import partial
from typing import Any

import click

from ktrdr_budget.cli.arguments import watch_options
from ktrdr_budget.cli.client import Service, expect_valid_response, service
from ktrdr_budget.cli.cycle_commands import cancel, cycles, status, trigger
from ktrdr_budget.cli.output import SEPARATOR, amount_text, can_show, cents, is_terminal, one_line, paint
from ktrdr_budget.cli.screen import show

__all__ = ["agent"]

_BAR_CELLS = 30
_SCARCE = Decimal("0.25")
"""If the remaining budget is below this fraction of the limit, the bar is yellow."""


@click.group()
def agent() -> None:
    """The agent's daily budget and its research cycles."""


for _command in (trigger, status, cancel, cycles):
    agent.add_command(_command)


@agent.command("budget")
@click.option("--exact", is_flag=True, help="Show all digits of amounts, up to a nano-dollar.")
@watch_options
def agent_budget(exact: bool, as_json: bool, watch: bool, interval: float) -> None:
    """Show the spend and the remainder of today's budget.

    Amounts are rounded to cents; --exact and --json show all digits. If the budget is exhausted, the exit code is
    still 0.
    """
    where = service()
    show(partial(_ask, where, exact), as_json, interval_s=interval if watch else None)


def _ask(where: Service, exact: bool) -> tuple[dict[str, Any], str]:
    """Read the budget from the service. Return the JSON document and a text form of the document."""
    answer = where.get("/agent/budget")
    with expect_valid_response(where):
        document = answer.document
        return document, status_text(document, exact=exact)


def status_text(status: Mapping[str, Any], *, exact: bool = False) -> str:
    """Format the status of the daily budget. On a terminal, the text includes a bar.

    Raises:
        LookupError, TypeError, ValueError, ArithmeticError: the document is not the status of a daily budget.
    """
    lines = ["Agent Budget Status", SEPARATOR, f"Date: {one_line(status['date'])}"]
    money = partial(amount_text, is_money=True) if exact else cents
    lines.append(f"Daily Limit: {money(status['daily_limit'])}")
    lines.append(f"Today's Spend: {money(status['today_spend'])}")
    lines += [f"{title}: {money(status[name])}" for title, name in _PARTS if status[name]]
    lines.append(f"Remaining: {money(status['remaining'])}")
    cycles = status["cycles_affordable"]
    lines.append(f"Cycles Affordable: {'unlimited' if cycles is None else f'~{int(cycles)}'}")
    if status.get("recovering_until"):
        lines.append(f"Recovering: the store lost writes; no cycle starts until {one_line(status['recovering_until'])}")
    if is_terminal() and status["daily_limit"]:
        lines.append(_bar(*(Decimal(status[name]) for name in ("daily_limit", "today_spend", "unconfirmed", "held"))))
    return "\n".join(lines)


_PARTS = (("Held", "held"), ("Unconfirmed", "unconfirmed"))


def _bar(limit: Decimal, spent: Decimal, unconfirmed: Decimal, held: Decimal) -> str:
    """Draw the spent, unconfirmed, held and free parts of the limit, with the used percentage."""
    used = spent + unconfirmed + held
    marks = "█▓▒·" if can_show("█▓▒·") else "#=-."
    widths = _cells((spent, unconfirmed, held), limit)
    left = limit - used
    color = "red" if left <= 0 else "yellow" if left < limit * _SCARCE else "green"
    segments = [mark * width for mark, width in zip(marks, [*widths, _BAR_CELLS - sum(widths)], strict=True)]
    percent = int(used * 100 / limit)
    shown = "<1%" if used and not percent else f"{percent}%"
    return f"[{paint(''.join(segments[:3]), fg=color)}{segments[3]}] {shown} used"


def _cells(parts: tuple[Decimal, ...], limit: Decimal) -> list[int]:
    """Return the number of cells of each part. A part above 0 has at least one cell.

    If some of the limit is left, at least one cell stays free.
    """
    total = sum(parts)
    cells_max = _BAR_CELLS if total >= limit else _BAR_CELLS - 1
    scale = max(limit, total)
    cells = [min(cells_max, max(1, int(part * _BAR_CELLS / scale))) if part else 0 for part in parts]
    while sum(cells) > cells_max:
        cells[cells.index(max(cells))] -= 1
    if total >= limit:
        cells[cells.index(max(cells))] += cells_max - sum(cells)
    return cells
