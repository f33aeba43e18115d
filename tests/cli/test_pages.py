"""Paged lists: one page, or all pages as one list, without a page twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from ktrdr_budget.cli import pages as module
from ktrdr_budget.cli.client import Answer
from ktrdr_budget.cli.errors import CommandError
from ktrdr_budget.cli.output import Table
from ktrdr_budget.cli.pages import pages, show_pages

Capture = pytest.CaptureFixture[str]


class Service:
    """A service that replies with the given pages, and records the queries."""

    url = "http://service"

    def __init__(self, *documents: dict[str, Any]) -> None:
        self.queries: list[dict[str, Any]] = []
        self._documents = iter(documents)

    def get(self, path: str, *, admin: bool, **query: Any) -> Answer:
        self.queries.append(query)
        return Answer(json.dumps(next(self._documents)))


def page(*items: int, cursor: str | None = None, **more: Any) -> dict[str, Any]:
    return {"items": list(items), "next_cursor": cursor, **more}


Serve = Callable[..., Service]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    def serve(*documents: dict[str, Any]) -> Service:
        made = Service(*documents)
        monkeypatch.setattr(module, "service", lambda: made)
        return made

    return serve


def listed(*, everything: bool = True, limit: int | None = None) -> list[int]:
    found = pages("/holds", "items", everything, limit=limit, cursor=None)
    return [item for answer in found for item in answer.document["items"]]


def test_one_page_is_read_unless_all_pages_are_requested(serve: Serve) -> None:
    service = serve(page(1, cursor="c"))
    assert listed(everything=False) == [1]
    assert service.queries == [{"limit": None, "cursor": None}]


def test_all_pages_are_requested_with_the_largest_page_size(serve: Serve) -> None:
    service = serve(page(1, cursor="c"), page(2, cursor="d"), page(3))
    assert listed() == [1, 2, 3]
    assert [(query["limit"], query["cursor"]) for query in service.queries] == [(1000, None), (1000, "c"), (1000, "d")]


def test_a_given_page_size_is_sent_when_all_pages_are_requested(serve: Serve) -> None:
    service = serve(page(1))
    listed(limit=5)
    assert service.queries[0]["limit"] == 5


def test_an_error_is_raised_if_the_service_sends_the_same_page_twice(serve: Serve) -> None:
    serve(page(1, cursor="c"), page(2, cursor="c"))
    with pytest.raises(CommandError, match="the service at http://service sent the same page twice"):
        listed()


def test_a_repeated_cursor_is_not_an_error_after_a_trim_of_the_ledger(serve: Serve) -> None:
    serve(page(1, cursor="c"), page(2, cursor="c", trimmed=True), page(3))
    assert listed() == [1, 2, 3]


@pytest.mark.parametrize("document", [{"items": []}, page(cursor=7), {"items": {}, "next_cursor": None}])
def test_a_reply_without_a_valid_page_is_an_error(serve: Serve, document: dict[str, Any]) -> None:
    serve(document)
    with pytest.raises(CommandError):
        listed()


def shown(capsys: Capture, *, everything: bool, as_json: bool) -> str:
    found = pages("/holds", "items", everything, limit=None, cursor=None)
    show_pages(found, "items", as_json, Table("ITEM"), lambda item: [str(item)], "No items.")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("document", "last"), [(page(), "No items."), (page(1, cursor="c"), "More: --cursor c, or --all"), (page(1), "1")]
)
def test_an_empty_or_incomplete_list_ends_with_a_message(
    serve: Serve, capsys: Capture, document: dict[str, Any], last: str
) -> None:
    serve(document)
    assert shown(capsys, everything=False, as_json=False).splitlines()[-1] == last


@pytest.mark.parametrize("documents", [[page(1)], [page(1, cursor="c"), page(2, 3, cursor="d"), page()]])
def test_all_pages_are_printed_as_one_json_document(
    serve: Serve, capsys: Capture, documents: list[dict[str, Any]]
) -> None:
    serve(*documents)
    items = [item for document in documents for item in document["items"]]
    assert json.loads(shown(capsys, everything=True, as_json=True)) == page(*items)


def test_the_whole_json_document_is_marked_as_trimmed_if_one_page_is_marked(serve: Serve, capsys: Capture) -> None:
    serve(page(1, cursor="c", trimmed=False), page(2, cursor="d", trimmed=True), page(3, trimmed=False))
    assert json.loads(shown(capsys, everything=True, as_json=True)) == page(1, 2, 3, trimmed=True)
