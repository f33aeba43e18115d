"""``ktrdr budget verify``: check that every window in the store adds up."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ktrdr_budget.cli.arguments import validate_seconds
from ktrdr_budget.cli.errors import CommandError, InvalidInput, Unreachable
from ktrdr_budget.cli.output import Table, amount_text, write, write_json
from ktrdr_budget.cli.screen import clock
from ktrdr_budget.errors import InvalidArgument, StoreUnavailable

if TYPE_CHECKING:
    from ktrdr_budget.audit import Auditor, Change, Repair, WindowReport

__all__ = ["verify"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON; with --watch, one line per check.")
@click.option("--watch", is_flag=True, help="Repeat the check until Ctrl-C or SIGTERM.")
@click.option(
    "--interval",
    metavar="SECONDS",
    default=5.0,
    callback=validate_seconds(0.1),
    show_default=True,
    help="Seconds between two checks of --watch.",
)
@click.option(
    "--repair", is_flag=True, help="Correct wrong counters and indexes; without --repair, the command writes nothing."
)
def verify(as_json: bool, watch: bool, interval: float, repair: bool) -> None:
    """Check that every window in the live store adds up.

    A window adds up if the spent and unconfirmed amounts together equal the sum of the ledger, and the held amount
    equals the sum of the open holds. The command reads the store directly: KTRDR_REDIS_URL, or the running embedded
    server of AGENT_BUDGET_DIR. If writes change a window during every attempt, the window is 'inconclusive'.

    --repair rebuilds wrong counters from the ledger and the records of the holds, and lists the changes. Replicas may
    continue to work meanwhile.

    Exit codes: 0 all windows add up (with --repair: after the repair), 1 a window does not add up (with --watch: in
    any of the checks), 2 wrong usage, 4 store unreachable.
    """
    if watch and repair:
        raise click.UsageError("--repair cannot be combined with --watch")
    with _store_errors(), _auditor() as auditor:
        if watch:
            _watch(auditor, as_json, interval)
        elif repair:
            _show_repair(auditor.repair(), as_json)
        else:
            _show(auditor.check(), as_json)


def _show(reports: Sequence[WindowReport], as_json: bool) -> None:
    if as_json:
        write_json(_documents(reports))
    elif not reports:
        write("No windows.")
    else:
        table = Table("RESULT", "BUDGET", "WINDOW", ">SPENT", ">UNCONFIRMED", ">LEDGER", ">HELD", ">HOLDS")
        table.write([_row(report) for report in reports])
    if failed := _failed(reports):
        raise CommandError(f"{len(failed)} of {len(reports)} windows do not add up")


# -- watch -------------------------------------------------------------------------------------------------------------


def _watch(auditor: Auditor, as_json: bool, interval_s: float) -> None:
    """Repeat the check until Ctrl-C or SIGTERM.

    Raises:
        CommandError: a window did not add up in at least one check.
        Unreachable: the store was unreachable at the first check. Or the store was unreachable at the last check, and
            all windows had added up in the checks before.
    """
    ever_failed: set[str] = set()
    before: dict[str, str] = {}
    unknown: Unreachable | None = None
    answered = False
    with _interruptible():
        try:
            while True:
                try:
                    with _store_errors():
                        reports = auditor.check()
                except Unreachable as error:
                    if not answered:
                        raise
                    unknown = error
                    error.show()
                else:
                    answered, unknown = True, None
                    ever_failed |= {report.window_key for report in _failed(reports)}
                    before = _report(reports, before, as_json)
                time.sleep(interval_s)
        except KeyboardInterrupt:
            pass
    if ever_failed:
        raise CommandError(f"{len(ever_failed)} windows did not add up")
    if unknown is not None:
        raise unknown


def _report(reports: Sequence[WindowReport], before: Mapping[str, str], as_json: bool) -> dict[str, str]:
    """Write a line for each window whose result has changed, and a summary. Return the results by window."""
    results = {report.window_key: _result(report) for report in reports}
    if as_json:
        write_json(_documents(reports), compact=True)
        return results
    now = clock()
    for report in reports:
        result = results[report.window_key]
        if result != before.get(report.window_key, "ok"):
            figures = [_amount(units, report.unit) for units in _sums(report).values()]
            spent, unconfirmed, ledger, held, holds = figures
            figures_text = f"spent {spent}, unconfirmed {unconfirmed}, ledger {ledger}, held {held}, holds {holds}"
            write(f"{now}  {result}: {report.budget} {report.window}: {report.fault or figures_text}")
    failed = len(_failed(reports))
    summary = f"{failed} of {len(reports)} windows DO NOT ADD UP" if failed else f"ok, windows: {len(reports)}"
    write(f"{now}  {summary}")
    return results


@contextmanager
def _interruptible() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C during the block."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- repair ------------------------------------------------------------------------------------------------------------


def _show_repair(repair: Repair, as_json: bool) -> None:
    wrong = [report for report in repair.windows if not report.conclusive or not report.adds_up]
    if as_json:
        changes = [_change(change) for change in repair.changes]
        indexes = [
            {"index": change.index, "hold_id": change.hold_id, "change": "added" if change.added else "removed"}
            for change in repair.index_changes
        ]
        write_json({"changes": changes, "index_changes": indexes, **_documents(repair.windows), "adds_up": not wrong})
    else:
        for index in repair.index_changes:
            write(f"Index {index.index}: hold {index.hold_id} {'added' if index.added else 'removed'}.")
        if repair.changes:
            table = Table("BUDGET", "WINDOW", "COUNTER", ">BEFORE", ">AFTER")
            table.write([_change_row(change) for change in repair.changes])
        if not repair.changes and not repair.index_changes:
            write(f"Nothing to repair in {len(repair.windows)} windows.")
    if wrong:
        raise CommandError(f"{len(wrong)} of {len(repair.windows)} windows do not add up or are inconclusive")


def _change(change: Change) -> dict[str, Any]:
    figures = {name: _counter(change, getattr(change, name), _plain) for name in ("before", "after")}
    names = {"budget": change.budget, "window": change.window, "unit": change.unit, "counter": change.counter}
    return {**names, **figures}


def _change_row(change: Change) -> list[str]:
    figures = [_counter(change, units, _amount) for units in (change.before, change.after)]
    return [change.budget, change.window, change.counter, *figures]


def _counter(change: Change, units: int, shown: Any) -> Any:
    return shown(units, "events" if change.counter == "events" else change.unit)


# -- the store ---------------------------------------------------------------------------------------------------------


def _auditor() -> Auditor:
    from ktrdr_budget import environment
    from ktrdr_budget.audit import Auditor

    try:
        tenant, url = environment.tenant(), environment.store_url()
    except InvalidArgument as error:
        raise InvalidInput(str(error)) from None
    if url is None:
        url = _embedded_url(environment.data_dir())
    else:
        _check_url(url)
    return Auditor(url, tenant)


def _check_url(url: str) -> None:
    from ktrdr_budget.engine.transport.urls import parse_url

    try:
        parse_url(url)
    except InvalidArgument as error:
        raise InvalidInput(f"KTRDR_REDIS_URL: {error}") from None


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
    """Convert an error of the store to a command error. Its message is one line, and passwords are masked."""
    try:
        yield
    except InvalidArgument as error:
        raise InvalidInput(str(error)) from None
    except (StoreUnavailable, OSError) as error:
        raise Unreachable(f"cannot verify: {error}") from None


def _failed(reports: Sequence[WindowReport]) -> list[WindowReport]:
    return [report for report in reports if not report.adds_up]


def _result(report: WindowReport) -> str:
    if report.fault:
        return "UNREADABLE"
    if not report.conclusive:
        return "inconclusive"
    return "ok" if report.adds_up else "DOES NOT ADD UP"


def _sums(report: WindowReport) -> dict[str, int]:
    return {name: getattr(report, name) for name in ("spent", "unconfirmed", "ledger_sum", "held", "holds_sum")}


def _row(report: WindowReport) -> list[str]:
    figures = ["unknown" if report.fault else _amount(units, report.unit) for units in _sums(report).values()]
    return [_result(report), report.budget, report.window, *figures]


def _documents(reports: Sequence[WindowReport]) -> dict[str, Any]:
    return {"windows": [_document(report) for report in reports], "adds_up": not _failed(reports)}


def _document(report: WindowReport) -> dict[str, Any]:
    """Return the JSON document of a window. Money is a decimal string, as in the API."""
    amounts = {name: None if report.fault else _plain(units, report.unit) for name, units in _sums(report).items()}
    names = {"budget": report.budget, "window": report.window, "unit": None if report.fault else report.unit}
    fault = {"fault": report.fault} if report.fault else {}
    return {**names, **amounts, "conclusive": report.conclusive, "adds_up": report.adds_up, **fault}


def _plain(units: int, unit: str) -> str | int:
    from ktrdr_budget.money import from_units

    return f"{from_units(units, unit):f}" if unit == "usd" else units


def _amount(units: int, unit: str) -> str:
    return amount_text(_plain(units, unit))
