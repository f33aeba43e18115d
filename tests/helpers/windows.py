"""Windows of the tenant ``t`` on one fixed day, for tests without a store."""

from __future__ import annotations

from typing import Any

from ktrdr_budget.engine.protocol.codes import COUNT, DOLLARS, SLOTS
from ktrdr_budget.engine.protocol.keys import Keys
from ktrdr_budget.engine.protocol.operations import Operation
from ktrdr_budget.engine.protocol.window import Window
from ktrdr_budget.periods import Span, window_named

KEYS = Keys("t")
DAY = window_named("day", "UTC", "2026-11-30")
EVER = Span("ever", 0, None)
_DEFINITIONS = {DOLLARS: "usd,day,UTC,spend", COUNT: "tokens,day,UTC,spend", SLOTS: "slots,ever,UTC,slots"}


def make_window(budget: str = "agent", flag: str = DOLLARS, **options: Any) -> Window:
    """The window of a budget on the fixed day; the endless window for slots."""
    options = {"definition": _DEFINITIONS[flag], **options}
    return Window(KEYS, budget, EVER if flag == SLOTS else DAY, flag, **options)


class _Names(dict[Window, str]):
    def __missing__(self, window: Window) -> str:
        return f" {window.budget}"


def text_of(op: Operation, *, fast: bool = False) -> str:
    """The text of an operation on the wire, with the budget in place of the number of each window.

    Args:
        fast: whether the text is that of the fast path.
    """
    return op.render_fast(_Names()) if fast else op.render(_Names())
