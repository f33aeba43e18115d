"""``ktrdr budget verify``: does every window in the store add up?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ktrdr_budget.cli.arguments import json_option
from ktrdr_budget.cli.errors import CommandError, InvalidInput, Unreachable
from ktrdr_budget.cli.output import Table, amount_text, write, write_json
from ktrdr_budget.errors import InvalidArgument, StoreUnavailable

if TYPE_CHECKING:
    from ktrdr_budget.verify import WindowReport

__all__ = ["verify"]


@click.command()
@json_option
def verify(as_json: bool) -> None:
    """Check on the live store that every window adds up.

    Spent and unconfirmed must be the sum of the ledger, held the sum of the open holds. It reads the store itself:
    KTRDR_REDIS_URL, or the embedded server of AGENT_BUDGET_DIR if that is running. The exit code is 1 if a window does
    not add up. A window that was written to all the time is 'inconclusive'.
    """
    with _store_errors():
        reports = _reports()
    if as_json:
        write_json({"windows": [_document(report) for report in reports], "adds_up": not _failed(reports)})
    elif not reports:
        write("No windows.")
    else:
        table = Table("RESULT", "BUDGET", "WINDOW", ">SPENT", ">UNCONFIRMED", ">LEDGER", ">HELD", ">HOLDS")
        table.write([_row(report) for report in reports])
    if failed := _failed(reports):
        raise CommandError(f"{len(failed)} of {len(reports)} windows do not add up")


def _reports() -> list[WindowReport]:
    from ktrdr_budget import environment
    from ktrdr_budget.verify import verify as verify_store

    tenant = environment.tenant()
    url = environment.store_url()
    if url is None:
        url = _embedded_url(environment.data_dir())
    else:
        _check_url(url)
    return verify_store(url, tenant, None)


def _check_url(url: str) -> None:
    from redis.connection import parse_url

    from ktrdr_budget.engine.store import check_url

    try:
        check_url(url)
        parse_url(url.replace("+cluster", ""))  # type: ignore[no-untyped-call]
    except InvalidArgument as error:
        raise InvalidInput(f"KTRDR_REDIS_URL: {error}") from None
    except ValueError:  # its words may hold a part of a password
        raise InvalidInput("KTRDR_REDIS_URL is not a URL of a store") from None


def _embedded_url(data_dir: str) -> str:
    from ktrdr_budget.engine import embedded

    url = embedded.find(data_dir)
    if url is None:
        raise Unreachable(
            f"no embedded server is running in {data_dir}; start one with 'ktrdr serve', or set KTRDR_REDIS_URL"
        )
    return url


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turns what the store raises into one line; a URL in it has no password."""
    try:
        yield
    except InvalidArgument as error:
        raise InvalidInput(str(error)) from None
    except (StoreUnavailable, OSError) as error:
        raise Unreachable(f"cannot verify: {error}") from None


def _failed(reports: Sequence[WindowReport]) -> list[WindowReport]:
    return [report for report in reports if report.conclusive and not report.adds_up]


def _result(report: WindowReport) -> str:
    if not report.conclusive:
        return "inconclusive"
    return "ok" if report.adds_up else "DOES NOT ADD UP"


def _row(report: WindowReport) -> list[str]:
    sums = (report.spent, report.unconfirmed, report.ledger_sum, report.held, report.holds_sum)
    return [_result(report), report.budget, report.window, *(_amount(units, report.unit) for units in sums)]


def _document(report: WindowReport) -> dict[str, Any]:
    """One window: money as decimal strings, like everywhere."""
    sums = ("spent", "unconfirmed", "ledger_sum", "held", "holds_sum")
    amounts = {name: _plain(getattr(report, name), report.unit) for name in sums}
    names = {"budget": report.budget, "window": report.window, "unit": report.unit}
    return {**names, **amounts, "conclusive": report.conclusive, "adds_up": report.adds_up}


def _plain(units: int, unit: str) -> str | int:
    from ktrdr_budget.money import from_units

    return str(from_units(units, unit)) if unit == "usd" else units


def _amount(units: int, unit: str) -> str:
    return amount_text(_plain(units, unit))
