"""Paged lists of the service."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import click

from ktrdr_budget.cli.client import Answer, expect_valid_response, service
from ktrdr_budget.cli.errors import CommandError
from ktrdr_budget.cli.output import Table, json_text, one_line, write, write_json

__all__ = ["paged", "pages", "show_pages"]

PAGE_MAX = 1000


def paged(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--limit``, ``--cursor`` and ``--all``."""
    command = click.option("--all", "everything", is_flag=True, help="List all pages.")(command)
    command = click.option("--cursor", help="Cursor of the next page, as printed below a page.")(command)
    return click.option("--limit", type=click.IntRange(1, PAGE_MAX), help="Number of items per page.")(command)


def pages(path: str, field: str, everything: bool, *, admin: bool = False, **query: object) -> Iterator[Answer]:
    """Yield the requested page. If ``everything`` is set, yield all later pages, too.

    Args:
        admin: whether to send the admin key, if one is set.
    """
    where = service()
    if everything and query["limit"] is None:
        query["limit"] = PAGE_MAX
    seen: set[object] = set()
    while True:
        answer = where.get(path, admin=admin, **query)
        with expect_valid_response(where):
            cursor = answer.document["next_cursor"]
            if not isinstance(answer.document[field], list) or not isinstance(cursor, str | None):
                raise TypeError(field)
        yield answer
        if not everything or cursor is None:
            return
        if answer.document.get("trimmed"):
            seen.clear()
        if cursor in seen:
            raise CommandError(f"the service at {where.url} sent the same page twice")
        seen.add(cursor)
        query["cursor"] = cursor


def show_pages(
    pages: Iterator[Answer], field: str, as_json: bool, table: Table, row: Callable[[Any], list[str]], none: str
) -> None:
    """Write a list page by page. The first items appear at once, and the whole list is never in memory."""
    if as_json:
        _write_pages_json(pages, field)
        return
    where, found, cursor = service(), False, None
    for page in pages:
        if page.document.get("trimmed"):
            write("Entries were trimmed meanwhile; the list starts again at the newest entry")
        with expect_valid_response(where):
            rows = [row(item) for item in page.document[field]]
        table.write(rows)
        found, cursor = found or bool(rows), page.document["next_cursor"]
    if cursor is not None:
        write(f"More: --cursor {one_line(cursor)}, or --all")
    elif not found:
        write(none)


def _write_pages_json(pages: Iterator[Answer], field: str) -> None:
    """Write one JSON document that has the form of a page, with the items of all pages."""
    first = next(pages).document
    second = next(pages, None)
    if second is None:
        write_json(first)
        return
    click.echo(f'{{"{field}": [', nl=False)
    separator, cursor, trimmed = "", None, first.get("trimmed")
    for document in _documents(first, second, pages):
        for item in document[field]:
            click.echo(separator + json_text(item), nl=False)
            separator = ",\n"
        cursor, trimmed = document["next_cursor"], trimmed or document.get("trimmed")
    ends = {"next_cursor": cursor} if trimmed is None else {"next_cursor": cursor, "trimmed": trimmed}
    write(f"], {json.dumps(ends)[1:]}")


def _documents(first: dict[str, Any], second: Answer, others: Iterator[Answer]) -> Iterator[dict[str, Any]]:
    yield first
    yield second.document
    for other in others:
        yield other.document
