"""Output of the commands: amounts, tables, JSON, and colours on a terminal.

Amounts are exact, with two to nine decimals ($0.15, $0.0372915). Only ``ktrdr agent budget`` and the budget in ``ktrdr
agent status`` round to cents (:func:`cents`).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import IO, Any

import click

__all__ = ["SEPARATOR", "Table", "amount_text", "can_show", "cents", "duration", "fields", "is_terminal"]
__all__ += ["json_text", "one_line", "paint", "write", "write_json"]

SEPARATOR = "=" * 30
"""Line under a title."""

_NANO = Decimal("1e-9")
_WIDE = Context(prec=60)
_LINE_CHARACTERS_MAX = 400
_MARKED = re.compile(r'"\\u0000([-0-9.]+)\\u0000"')


def write(text: str, file: IO[Any] | None = None) -> None:
    """Write a text and a newline to ``file``. Default: stdout. Characters that its encoding lacks are escaped."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def write_json(document: Any, *, compact: bool = False) -> None:
    """Write a JSON document in one line. On a terminal, indent the document, unless ``compact`` is set."""
    write(json_text(document, indent=2 if not compact and is_terminal() else None))


def json_text(document: Any, *, indent: int | None = None) -> str:
    """Format JSON with ``Decimal`` fractions as plain numbers: 0.000000001, where a float would give 1e-09."""
    return _MARKED.sub(r"\1", json.dumps(document, indent=indent, default=_marked))


def _marked(value: object) -> str:
    if not isinstance(value, Decimal):
        raise TypeError(f"not a JSON value: {value!r}")
    return f"\0{value:f}\0"


def one_line(text: object) -> str:
    """Format external text as one short line without control characters."""
    words = " ".join(str(text).split())
    plain = "".join(character if character.isprintable() else "?" for character in words)
    return plain if len(plain) <= _LINE_CHARACTERS_MAX else plain[: _LINE_CHARACTERS_MAX - 1] + "…"


def is_terminal() -> bool:
    """Whether stdout is a terminal that can move its cursor."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def can_show(marks: str) -> bool:
    """Whether stdout's encoding has these characters."""
    try:
        marks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def paint(text: str, **style: Any) -> str:
    """Apply a style of ``click.style`` on a terminal, unless ``NO_COLOR`` is set."""
    return click.style(text, **style) if is_terminal() and not os.environ.get("NO_COLOR") else text


def amount_text(value: str | int | Decimal | None, *, is_money: bool | None = None) -> str:
    """Format an amount of the service: ``$0.15``, ``3``, or ``unlimited`` for ``None``.

    Args:
        value: a decimal string for dollars, an integer for a count.
        is_money: whether the value is dollars. Default: the type of the value decides.

    Raises:
        ValueError, TypeError, ArithmeticError: the value is not an amount.
    """
    if value is None:
        return "unlimited"
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal)):
        raise TypeError(f"not an amount: {value!r}")
    if is_money is None:
        is_money = isinstance(value, str)
    return dollars(Decimal(value)) if is_money else str(int(value))


def cents(value: str | int | Decimal | None) -> str:
    """Format dollars with two decimals, rounded as ``f"${value:.2f}"`` rounds a float; ``unlimited`` for ``None``."""
    if value is None:
        return "unlimited"
    amount_text(value, is_money=True)  # raises if the value is not an amount
    return f"${float(value):.2f}"


def dollars(value: Decimal) -> str:
    """Format dollars, exact to the nano-dollar: ``$0.15``, ``-$0.0372915``."""
    if not value.is_finite():
        raise ValueError(f"not an amount: {value}")
    # Rounded to the nearest nano-dollar, which removes the noise of floats: 0.0016150000000000001 is 0.001615.
    nanos = abs(value).quantize(_NANO, rounding=ROUND_HALF_EVEN, context=_WIDE)
    whole, _, decimals = f"{nanos:f}".partition(".")
    sign = "-" if value < 0 and nanos else ""
    return f"{sign}${whole}.{decimals.rstrip('0').ljust(2, '0')}"


def duration(seconds: int) -> str:
    """Format whole seconds in their two largest units: ``7 s``, ``2 min 5 s``, ``17 h 32 min``, ``3 d 4 h``."""
    parts = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        parts.append((count, unit))
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    shown = [f"{count} {unit}" for count, unit in parts[first : first + 2] if count]
    return " ".join(shown) or "0 s"


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Format ``Name: value`` lines with aligned values."""
    rows = [(f"{name}:", one_line(value)) for name, value in pairs]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


class Table:
    """A table with aligned columns. The table is written page by page, and a later page may widen a column.

    If a line would exceed the width of the terminal, each row becomes a block of fields.

    Args:
        columns: the headings. A leading ``>`` aligns the column to the right.
    """

    def __init__(self, *columns: str) -> None:
        self._headings = [column.removeprefix(">") for column in columns]
        self._right = [column.startswith(">") for column in columns]
        self._widths = [len(heading) for heading in self._headings]
        self._begun = False
        self._stacked = False

    def write(self, rows: Sequence[Sequence[object]]) -> None:
        """Write rows. The first call also writes the headings."""
        if not rows:
            return
        cells = [[one_line(cell) for cell in row] for row in rows]
        columns = zip(self._widths, *cells, strict=True)
        self._widths = [max(width, *map(len, column)) for width, *column in columns]
        width = _columns()
        self._stacked |= width is not None and sum(self._widths) + 2 * (len(self._widths) - 1) > width
        begun, self._begun = self._begun, True
        if self._stacked:
            write(("\n" if begun else "") + "\n\n".join(self._block(row) for row in cells))
            return
        lines = [self._line(row) for row in cells]
        if not begun:
            lines.insert(0, paint(self._line(self._headings), bold=True))
        write("\n".join(lines))

    def _block(self, row: Sequence[str]) -> str:
        return fields((heading, cell) for heading, cell in zip(self._headings, row, strict=True) if cell)

    def _line(self, row: Sequence[str]) -> str:
        columns = zip(row, self._widths, self._right, strict=True)
        return "  ".join(f"{cell:>{width}}" if right else f"{cell:<{width}}" for cell, width, right in columns).rstrip()


def _columns() -> int | None:
    """Return the width of the terminal, or ``None`` if stdout is not a terminal."""
    return (os.get_terminal_size(sys.stdout.fileno()).columns or None) if is_terminal() else None
