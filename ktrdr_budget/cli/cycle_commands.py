"""``ktrdr agent trigger``, ``status``, ``cancel`` and ``cycles``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from ktrdr_budget.cli.arguments import json_option, new_id, validate_name, validate_seconds, watch_options
from ktrdr_budget.cli.client import Service, expect_valid_response, segment, service
from ktrdr_budget.cli.cycle_texts import CYCLE_COLUMNS, cycle_row, status_text
from ktrdr_budget.cli.errors import CommandError
from ktrdr_budget.cli.output import Table, one_line, write, write_json
from ktrdr_budget.cli.pages import paged, pages, show_pages
from ktrdr_budget.cli.screen import show

__all__ = ["cancel", "cycles", "status", "trigger"]


@click.command()
@click.option(
    "--id", "operation_id", callback=validate_name, help="Id of the cycle and idempotency key. Default: generated."
)
@click.option("--strategy", metavar="NAME", help="Train this existing strategy and skip the design; excludes --brief.")
@click.option("--brief", metavar="TEXT", help="Instructions for the design; excludes --strategy.")
@click.option(
    "-m", "--model", metavar="NAME", help="Language model of the cycle: a full model name, or opus, sonnet, haiku."
)
@click.option(
    "-b",
    "--bypass-gates",
    "--bypass",
    is_flag=True,
    help="Continue the cycle after a failed gate; the result is recorded.",
)
@click.option("--wait", is_flag=True, help="Follow the cycle until it ends.")
@click.option(
    "--interval",
    metavar="SECONDS",
    default=0.5,
    callback=validate_seconds(0.1),
    show_default=True,
    help="Seconds between two requests of --wait.",
)
@click.option("--json", "as_json", is_flag=True, help="With --wait, print the cycle as JSON, one line per step.")
def trigger(
    operation_id: str | None,
    strategy: str | None,
    brief: str | None,
    model: str | None,
    bypass_gates: bool,
    wait: bool,
    interval: float,
    as_json: bool,
) -> None:
    """Start a research cycle.

    The command prints the JSON reply of the service. If a budget denies the cycle, the reply describes the denial, and
    the exit code is 3. With --wait, the exit code is 0 if the cycle completes, and 1 if the cycle fails or is
    cancelled. Ctrl-C stops the command; the cycle continues.
    """
    where = service()
    options = {"strategy": strategy, "brief": brief, "model": model, "bypass_gates": bypass_gates or None}
    body: dict[str, Any] = {"operation_id": operation_id or new_id("op")}
    body |= {name: value for name, value in options.items() if value is not None}
    repeat = f"; the request may have taken effect: repeating the request with --id {body['operation_id']} is safe"
    try:
        answer = where.send("POST", "/agent/trigger", body, repeat=repeat)
    except CommandError as error:
        if error.problem is not None and "triggered" in error.problem:
            write_json(error.problem)
        raise
    with expect_valid_response(where):
        started = str(answer.document["operation_id"])
    write_json(answer.document, compact=as_json)
    if wait:
        from ktrdr_budget.cli.following import follow  # loaded only for --wait

        follow(where, started, interval, as_json)


@click.command()
@watch_options
def status(as_json: bool, watch: bool, interval: float) -> None:
    """Show the active cycles, the remaining budget and the free slots.

    The output also has the cycle that ended last. The remaining budget is today's. Every replica reports the same
    figures.
    """
    show(partial(_ask, service()), as_json, interval_s=interval if watch else None)


def _ask(where: Service) -> tuple[dict[str, Any], str]:
    answer = where.get("/agent/status")
    with expect_valid_response(where):
        document = answer.document
        return document, status_text(document)


@click.command()
@click.argument("operation_id", metavar="ID", callback=validate_name)
@json_option
def cancel(operation_id: str, as_json: bool) -> None:
    """Cancel a research cycle, on any replica.

    The spend of the cycle so far is charged.
    """
    where = service()
    repeat = "; the request may have taken effect: repeating the request is safe"
    answer = where.send("DELETE", f"/agent/cancel/{segment(operation_id)}", repeat=repeat)
    with expect_valid_response(where):
        title = {"cancelled": "Cancelled", "cancelling": "Cancelling"}[answer.document["status"]]
        text = one_line(f"{title} {answer.document['operation_id']}: {answer.document['message']}")
    if as_json:
        write_json(answer.document)
    else:
        write(text)


@click.command()
@paged
@json_option
def cycles(limit: int | None, cursor: str | None, everything: bool, as_json: bool) -> None:
    """List research cycles, newest first."""
    found = pages("/agent/cycles", "cycles", everything, limit=limit, cursor=cursor)
    show_pages(found, "cycles", as_json, Table(*CYCLE_COLUMNS), cycle_row, "No cycles.")
