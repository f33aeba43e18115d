"""A window: one budget in one interval, such as a day. Requests to the store refer to windows."""

from __future__ import annotations

from ktrdr_budget.engine.protocol.codes import COUNT, DOLLARS, SLOTS
from ktrdr_budget.engine.protocol.keys import Keys, stored_window
from ktrdr_budget.models import Budget
from ktrdr_budget.periods import Span

__all__ = ["BatchWindows", "Window", "flag_of"]


class Window:
    """One budget in one interval, such as a day.

    Args:
        definition: the definition of the budget; ``-`` if this replica does not have the budget or defines it
            differently.
        expires_ms: when the window's keys expire; 0: they never expire.
        limit: the configured limit in whole units; ``None``: the budget is uncapped, or this replica has no limit.
        asserts_limit: whether a reservation writes ``limit`` to the store.
        stored: the store's name of the window; if ``None``, the name is derived from ``definition``.
    """

    __slots__ = (
        "budget",
        "expires_ms",
        "flag",
        "has_grants",
        "key",
        "ledger_key",
        "name",
        "segment",
        "span",
        "stored",
        "unit",
        "words",
    )

    def __init__(
        self,
        keys: Keys,
        budget: str,
        span: Span,
        flag: str,
        *,
        definition: str = "-",
        expires_ms: int = 0,
        limit: int | None = None,
        asserts_limit: bool = False,
        stored: str | None = None,
    ) -> None:
        self.has_grants = False
        """Whether the store has granted a reservation of this replica in this window.

        If so, the store has the limit of the window.
        """
        self.budget = budget
        self.span = span
        self.flag = flag
        self.unit = "usd" if flag == DOLLARS else "count"
        self.expires_ms = expires_ms
        self.stored = stored_window(span.name, definition) if stored is None else stored
        self.name = f"{budget}:{self.stored}"
        self.segment = f"|{flag},{self.name},,"
        """The beginning of this window's segment in a hold record."""
        self.key = keys.window(budget, self.stored)
        self.ledger_key = keys.ledger(budget, self.stored)
        bounds = (str(span.start_ms), str(span.end_ms or 0), str(expires_ms))
        limit_word = "-" if limit is None else str(limit)
        self.words = (self.name, flag, definition, *bounds, limit_word, "!" if asserts_limit else "?")
        """The arguments by which a batch describes the window to the store."""

    def __repr__(self) -> str:
        return f"<Window {self.name}>"


class BatchWindows(dict[Window, str]):
    """The windows of a batch, each with its number and a space before the number.

    The look-up of a window that is not listed yet appends the window to the list.
    """

    def __init__(self) -> None:
        self.listed: list[Window] = []
        """The windows by their numbers, which begin at 1."""
        self._numbers: dict[str, str] = {}
        """The numbers by the keys of windows, because several objects may describe one window."""

    def __missing__(self, window: Window) -> str:
        number = self._numbers.get(window.key)
        if number is None:
            self.listed.append(window)
            number = self._numbers[window.key] = f" {len(self.listed)}"
        self[window] = number
        return number

    @property
    def store_keys(self) -> list[str]:
        """The keys of the listed windows, each followed by the key of the window's ledger."""
        return [key for window in self.listed for key in (window.key, window.ledger_key)]


def flag_of(budget: Budget) -> str:
    """The letter for this budget in hold records. It stands for slots, dollars or a count."""
    return SLOTS if budget.kind == "slots" else DOLLARS if budget.unit == "usd" else COUNT
