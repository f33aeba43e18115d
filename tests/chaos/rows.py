"""All faults of the chaos bench, in the order of the table in ``docs/reliability.md``."""

from __future__ import annotations

from . import deaths, groups, lines, losses, shortages

ROWS = [*deaths.ROWS, *losses.ROWS, *groups.ROWS, *lines.ROWS, *shortages.ROWS]
