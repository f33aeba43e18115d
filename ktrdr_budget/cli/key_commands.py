"""``ktrdr key``: the access keys of the service."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from ktrdr_budget.cli.arguments import json_option, reason_option, reason_query, validate_name
from ktrdr_budget.cli.client import expect_valid_response, segment, service
from ktrdr_budget.cli.output import Table, fields, write, write_json
from ktrdr_budget.cli.pages import paged, pages, show_pages

__all__ = ["key"]


@click.group()
def key() -> None:
    """Access keys of the service.

    The commands need the admin key.
    """


def _scope(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    scope: dict[str, str] = {}
    for word in words:
        field, separator, value = word.partition("=")
        if not separator:
            raise click.BadParameter(f"must be FIELD=VALUE, not {word!r}")
        if field in scope:
            raise click.BadParameter(f"field {field!r} is given twice")
        scope[field] = value
    return scope


def _fields(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    return [field.strip() for field in text.split(",")] if text else []


@key.command()
@click.argument("name", callback=validate_name)
@click.option("--scope", multiple=True, callback=_scope, metavar="FIELD=VALUE", help="Scope of the key; repeatable.")
@click.option(
    "--may-set", default="", callback=_fields, metavar="FIELD,...", help="Further fields that a request may set."
)
@click.option(
    "--rights",
    type=click.Choice(["read", "use", "admin"]),
    default="use",
    show_default=True,
    help="To read; also to reserve, settle and record; everything.",
)
@click.option("--expires", metavar="DURATION", help="Lifetime, such as 90d or 12h.  [default: until it is revoked]")
@reason_option
@json_option
def create(
    name: str, scope: dict[str, str], may_set: list[str], rights: str, expires: str | None, reason: str, as_json: bool
) -> None:
    """Create a key, and print its secret.

    The secret is printed once. The store keeps its SHA-256 digest.
    """
    where = service()
    body: dict[str, Any] = {"name": name, "scope": scope, "may_set": may_set, "rights": rights}
    if expires is not None:
        body["expires"] = expires
    if reason:
        body["reason"] = reason
    repeat = f"; before you repeat the command, revoke the key: ktrdr key revoke {name}"
    answer = where.send("POST", "/keys", body, admin=True, repeat=repeat)
    with expect_valid_response(where):
        text = fields([*_key_fields(answer.document), ("Secret", answer.document["secret"])])
    if as_json:
        write_json(answer.document)
    else:
        write(f"{text}\nThe secret is not shown again.")


@key.command("list")
@paged
@json_option
def list_keys(limit: int | None, cursor: str | None, everything: bool, as_json: bool) -> None:
    """List the keys by name, without their secrets."""
    table = Table("NAME", "RIGHTS", "SCOPE", "MAY SET", "CREATED AT", "EXPIRES AT")
    found = pages("/keys", "keys", everything, admin=True, limit=limit, cursor=cursor)
    show_pages(found, "keys", as_json, table, _key_row, "No keys.")


@key.command()
@click.argument("name", callback=validate_name)
@reason_option
@json_option
def revoke(name: str, reason: str, as_json: bool) -> None:
    """Revoke a key.

    The next request with the key is refused, on every replica. Its holds stay open.
    """
    where = service()
    answer = where.send("DELETE", f"/keys/{segment(name)}{reason_query(reason)}", admin=True)
    with expect_valid_response(where):
        text = f"Revoked {answer.document['name']}"
    if as_json:
        write_json(answer.document)
    else:
        write(text)


def _key_fields(item: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Key", item["name"]
    yield "Rights", item["rights"]
    yield "Scope", _scope_text(item) or "none"
    if item["may_set"]:
        yield "May set", ", ".join(item["may_set"])
    yield "Expires at", item["expires_at"] or "never"


def _key_row(item: Mapping[str, Any]) -> list[str]:
    expires = item["expires_at"] or "never"
    return [item["name"], item["rights"], _scope_text(item), ", ".join(item["may_set"]), item["created_at"], expires]


def _scope_text(item: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in item["scope"].items())
