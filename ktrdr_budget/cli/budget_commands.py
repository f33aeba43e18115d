"""``ktrdr budget``: the service's budgets, their limits, holds and ledgers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from ktrdr_budget.cli.arguments import (
    AmountCommand,
    json_option,
    reason_option,
    reason_query,
    validate_end,
    validate_name,
)
from ktrdr_budget.cli.client import Answer, Service, expect_valid_response, segment, service
from ktrdr_budget.cli.errors import CommandError
from ktrdr_budget.cli.output import Table, amount_text, fields, write, write_json
from ktrdr_budget.cli.pages import paged, pages, show_pages
from ktrdr_budget.cli.spend_commands import commit, record, release, reserve
from ktrdr_budget.cli.verify_command import verify

__all__ = ["budget"]


@click.group()
def budget() -> None:
    """Budgets: limits, holds, spend and ledgers."""


for _command in (reserve, commit, release, record, verify):
    budget.add_command(_command)


@budget.command("list")
@json_option
def list_budgets(as_json: bool) -> None:
    """List all budgets, each in its current window."""
    where = service()
    answer = where.get("/budgets")
    with expect_valid_response(where):
        rows = [_summary(item) for item in answer.document["budgets"]]
        unknown = {item["budget"]: item["detail"] for item in answer.document.get("unavailable", ())}
        rows += [[name, *["unknown"] * 8] for name in unknown]
    if as_json:
        write_json(answer.document)
    elif not rows:
        write("No budgets.")
    else:
        Table("NAME", "WINDOW", "UNIT", ">LIMIT", ">SPENT", ">HELD", ">UNCONFIRMED", ">REMAINING", "RESETS AT").write(
            rows
        )
        if any(row[3].endswith("*") for row in rows):
            write("* set at run time")
    errors = [CommandError(detail) for detail in unknown.values()]
    for error in errors[:-1]:
        error.show()
    if errors:
        raise errors[-1]


@budget.command()
@click.argument("name", callback=validate_name)
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one budget with all its figures."""
    where = service()
    _show_budget(where, where.get(_path(name)), as_json)


@budget.command("set-limit", cls=AmountCommand)
@click.argument("name", callback=validate_name)
@click.argument("limit")
@click.option(
    "--until",
    callback=validate_end,
    metavar="WHEN|window|never",
    help="End of the limit: an instant such as 2026-11-24T00:00:00Z, the end of the current window, or never.  "
    "[default: never]",
)
@reason_option
@json_option
def set_limit(name: str, limit: str, until: str | None, reason: str, as_json: bool) -> None:
    """Set a limit for all replicas.

    The limit overrides the configured limit. LIMIT is an amount in dollars or a count; 'unlimited' removes the cap, and
    0 denies every reservation. The command needs the admin key.
    """
    where = service()
    body: dict[str, Any] = {"limit": None if limit.strip().lower() == "unlimited" else limit}
    if until is not None:
        body["until"] = until
    if reason:
        body["reason"] = reason
    _show_budget(where, where.send("PUT", f"{_path(name)}/limit", body, admin=True), as_json)


@budget.command("clear-limit")
@click.argument("name", callback=validate_name)
@reason_option
@json_option
def clear_limit(name: str, reason: str, as_json: bool) -> None:
    """Restore the configured limit. The command needs the admin key."""
    where = service()
    _show_budget(where, where.send("DELETE", f"{_path(name)}/limit{reason_query(reason)}", admin=True), as_json)


@budget.command()
@click.argument("name", callback=validate_name)
@json_option
def migrate(name: str, as_json: bool) -> None:
    """Register the service's definition of a budget.

    A definition is the unit, kind, period and timezone of a budget. The first use of a budget registers the definition,
    and all replicas must use the registered definition. This command replaces the registered definition. Open holds are
    settled in the windows in which they were reserved. The command needs the admin key.
    """
    where = service()
    answer = where.send("POST", f"{_path(name)}/migrate", admin=True)
    with expect_valid_response(where):
        text = fields(_migration_fields(answer.document))
    if as_json:
        write_json(answer.document)
    else:
        write(text)


@budget.command()
@click.argument("name", callback=validate_name)
@paged
@json_option
def holds(name: str, limit: int | None, cursor: str | None, everything: bool, as_json: bool) -> None:
    """List open and unconfirmed holds, latest deadline first."""
    table = Table("ID", "STATE", ">AMOUNT", ">ACCRUED", ">CHARGED", "EXPIRES AT", "OPERATION")
    found = pages(f"{_path(name)}/holds", "holds", everything, limit=limit, cursor=cursor)
    show_pages(found, "holds", as_json, table, lambda hold: _hold_row(hold, name), f"No holds of {name}.")


@budget.command()
@click.argument("name", callback=validate_name)
@click.option("--window", help="Name of the window, such as 2026-11-23 for a day. Default: the current window.")
@paged
@json_option
def ledger(
    name: str, window: str | None, limit: int | None, cursor: str | None, everything: bool, as_json: bool
) -> None:
    """List the ledger entries of a window, newest first.

    The sum of the entries equals the spent and the unconfirmed amount together.
    """
    table = Table("AT", "KIND", ">AMOUNT", "HOLD", "OPERATION", "TRACE", "ENTRY")
    found = pages(f"{_path(name)}/ledger", "entries", everything, window=window, limit=limit, cursor=cursor)
    show_pages(found, "entries", as_json, table, _entry_row, f"No entries in the ledger of {name}.")


@budget.command()
@paged
@json_option
def changes(limit: int | None, cursor: str | None, everything: bool, as_json: bool) -> None:
    """List the changes that were made at run time, newest first.

    The command needs the admin key.
    """
    table = Table(">NUMBER", "AT", "KIND", "NAME", "BEFORE", "AFTER", "BY", "REASON")
    found = pages("/changes", "changes", everything, admin=True, limit=limit, cursor=cursor)
    show_pages(found, "changes", as_json, table, _change_row, "No changes.")


def _path(name: str) -> str:
    return f"/budgets/{segment(name)}"


# --- One budget -----------------------------------------------------------------------------------


def _summary(item: Mapping[str, Any]) -> list[str]:
    mark = "*" if item["limit_source"] == "runtime" else ""
    amounts = [amount_text(item[name]) for name in ("spent", "held", "unconfirmed", "remaining")]
    limit = amount_text(item["limit"]) + mark
    return [item["name"], item["window"], item["unit"], limit, *amounts, item["resets_at"] or "never"]


def _show_budget(where: Service, answer: Answer, as_json: bool) -> None:
    with expect_valid_response(where):
        text = fields(_budget_fields(answer.document))
    if as_json:
        write_json(answer.document)
    else:
        write(text)


def _budget_fields(item: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kind = "" if item["kind"] == "spend" else f", {item['kind']}"
    yield "Budget", item["name"]
    yield "Window", f"{item['window']} ({item['period']}, {item['timezone']}{kind})"
    yield "Unit", item["unit"]
    yield "Limit", amount_text(item["limit"]) + _limit_source(item)
    for name in ("spent", "held", "unconfirmed", "remaining"):
        yield name.capitalize(), amount_text(item[name])
    yield "Spend events", str(int(item["spend_events"]))
    yield "Overruns", str(int(item["overruns"]))
    yield "Resets at", item["resets_at"] or "never"
    yield "As of", item["as_of"]
    if item.get("recovering_until"):
        yield "Recovering", f"the store lost writes; nothing is admitted until {item['recovering_until']}"


def _migration_fields(item: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Budget", item["budget"]
    yield "Before", item["before"] or "not registered"
    yield "Now", item["after"]
    if item["limit_cleared"]:
        yield "Limit", "the run-time limit was cleared because its unit has changed"


def _limit_source(item: Mapping[str, Any]) -> str:
    if item["limit_source"] != "runtime":
        return ""
    until = f" until {item['limit_until']}" if item["limit_until"] else ""
    return f" (set at run time{until}; configured: {amount_text(item['configured_limit'])})"


# --- Rows -----------------------------------------------------------------------------------------


def _hold_row(hold: Mapping[str, Any], name: str) -> list[str]:
    amounts = [_amount_in(hold[field], name) for field in ("amounts", "accrued", "charged")]
    return [hold["id"], hold["state"], *amounts, hold["expires_at"], _operation(hold)]


def _amount_in(amounts: Mapping[str, Any], name: str) -> str:
    return amount_text(amounts[name]) if name in amounts else ""


def _entry_row(entry: Mapping[str, Any]) -> list[str]:
    at, kind, hold_id, trace_id, number = (entry[name] for name in ("at", "kind", "hold_id", "trace_id", "entry_id"))
    return [at, kind, amount_text(entry["amount"]), hold_id, _operation(entry), trace_id, number]


def _operation(item: Mapping[str, Any]) -> str:
    """The operation, with the scope after it if there is one: ``research (team=quant, user=alice)``."""
    scope = ", ".join(f"{field}={value}" for field, value in item["scope"].items())
    return f"{item['operation']} ({scope})".lstrip() if scope else item["operation"]


def _change_row(change: Mapping[str, Any]) -> list[str]:
    names = ("at", "kind", "name", "before", "after", "by", "reason")
    return [str(int(change["number"])), *(change[name] for name in names)]
