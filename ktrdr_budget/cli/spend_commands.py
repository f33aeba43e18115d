"""``ktrdr budget reserve``, ``commit``, ``release`` and ``record``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from ktrdr_budget.cli.arguments import AmountCommand, amounts_of, json_option, new_id, validate_name, validate_seconds
from ktrdr_budget.cli.client import Answer, Service, expect_valid_response, segment, service
from ktrdr_budget.cli.errors import Denied
from ktrdr_budget.cli.output import amount_text, one_line, write, write_json

__all__ = ["commit", "record", "release", "reserve"]

_AMOUNTS = "NAME AMOUNT | NAME=AMOUNT..."


@click.command(cls=AmountCommand)
@click.argument("amounts", nargs=-1, required=True, metavar=_AMOUNTS)
@click.option("--id", "hold_id", callback=validate_name, help="Id of the hold and idempotency key. Default: generated.")
@click.option(
    "--ttl",
    type=float,
    callback=validate_seconds(1),
    metavar="SECONDS",
    help="Seconds until the hold expires.  [default: 900]",
)
@click.option(
    "--on-expiry",
    type=click.Choice(["charge", "accrued", "release"]),
    help="After the hold expires, this counts as unconfirmed: the whole amount (charge), the accrued amount (accrued), "
    "or nothing (release).  [default: charge]",
)
@click.option("--operation", help="Label of the hold in the ledger.")
@json_option
def reserve(
    amounts: tuple[str, ...],
    hold_id: str | None,
    ttl: float | None,
    on_expiry: str | None,
    operation: str | None,
    as_json: bool,
) -> None:
    """Reserve an amount before the work.

    Either all named budgets grant their amounts, or none does. If a budget denies its amount, the exit code is 3, and
    with --json the figures of the denial are on stdout.
    """
    where = service()
    body: dict[str, Any] = {"amounts": amounts_of(amounts), "id": hold_id or new_id("hold")}
    if ttl is not None:
        body["ttl"] = int(ttl) if ttl.is_integer() else ttl
    body |= {name: value for name, value in (("on_expiry", on_expiry), ("operation", operation)) if value is not None}
    try:
        answer = where.send("POST", "/reservations", body, repeat=_repeat(body["id"]))
    except Denied as denied:
        if as_json:
            write_json(denied.problem)
        raise
    _show(where, answer, as_json, _reserved)


@click.command(cls=AmountCommand)
@click.argument("hold_id", metavar="ID", callback=validate_name)
@click.argument("amounts", nargs=-1, metavar="[AMOUNT | NAME=AMOUNT...]")
@json_option
def commit(hold_id: str, amounts: tuple[str, ...], as_json: bool) -> None:
    """Record the actual cost of a hold.

    Without AMOUNT, the accrued amount is committed. A single AMOUNT is committed for each budget in dollars; every
    other budget commits its reserved amount. To commit an unconfirmed hold of another owner, the admin key is needed.
    """
    body: dict[str, Any] = {}
    if len(amounts) == 1 and "=" not in amounts[0]:
        body["amounts"] = amounts[0]
    elif amounts:
        body["amounts"] = _mapping(amounts)
    where = service()
    path = f"/reservations/{segment(hold_id)}/commit"
    _show(where, where.send("POST", path, body, admin=True, repeat=_REPEAT), as_json, _settled("Committed"))


@click.command()
@click.argument("hold_id", metavar="ID", callback=validate_name)
@json_option
def release(hold_id: str, as_json: bool) -> None:
    """Release the whole amount of a hold.

    If the admin key is set, or if the hold is unconfirmed, the release is not final: a later commit by the worker of
    the hold still counts. To release an unconfirmed hold of another owner, the admin key is needed.
    """
    where = service()
    path = f"/reservations/{segment(hold_id)}/release"
    _show(where, where.send("POST", path, {}, admin=True, repeat=_REPEAT), as_json, _settled("Released"))


@click.command(cls=AmountCommand)
@click.argument("amounts", nargs=-1, required=True, metavar=_AMOUNTS)
@click.option(
    "--id", "spend_id", callback=validate_name, help="Id of the spend and idempotency key. Default: generated."
)
@click.option("--operation", help="Label of the spend in the ledger.")
@json_option
def record(amounts: tuple[str, ...], spend_id: str | None, operation: str | None, as_json: bool) -> None:
    """Record spend without a reservation. No budget denies recorded spend."""
    where = service()
    body: dict[str, Any] = {"amounts": amounts_of(amounts), "id": spend_id or new_id("spend")}
    if operation is not None:
        body["operation"] = operation
    _show(where, where.send("POST", "/spend", body, repeat=_repeat(body["id"])), as_json, _settled("Recorded"))


_REPEAT = "; the request may have taken effect: repeating the request is safe"


def _repeat(id: str) -> str:
    return f"; the request may have taken effect: repeating the request with --id {id} is safe"


def _mapping(words: tuple[str, ...]) -> dict[str, str]:
    if not all("=" in word for word in words):
        raise click.UsageError("give one AMOUNT, or NAME=AMOUNT once or more")
    return amounts_of(words)


def _show(where: Service, answer: Answer, as_json: bool, describe: Callable[[Mapping[str, Any]], str]) -> None:
    with expect_valid_response(where):
        text = describe(answer.document)
    if as_json:
        write_json(answer.document)
    else:
        write(text)


def _reserved(hold: Mapping[str, Any]) -> str:
    """Describe a new hold: ``Reserved op_1: agent $0.15; expires 2026-11-23T12:15:00Z``.

    For a replay, the text has the state of the hold instead of the deadline.
    """
    if not hold["replayed"]:
        return one_line(f"Reserved {hold['id']}: {_amounts(hold['amounts'])}; expires {hold['expires_at']}")
    return one_line(f"Replayed {hold['id']}: {_amounts(hold['amounts'])}; {hold['state']}")


def _settled(done: str) -> Callable[[Mapping[str, Any]], str]:
    def describe(settlement: Mapping[str, Any]) -> str:
        notes = [note for name, note in _NOTES.items() if settlement[name]]
        text = f"{done} {settlement['id']}: {_amounts(settlement['amounts'])}"
        return one_line(text + (f" ({'; '.join(notes)})" if notes else ""))

    return describe


_NOTES = {
    "replayed": "replayed",
    "overrun": "above the reservation",
    "late": "after expiry or release",
}


def _amounts(amounts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {amount_text(amount)}" for name, amount in amounts.items())
