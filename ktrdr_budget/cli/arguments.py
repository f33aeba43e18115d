"""Arguments and options shared by several commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import urlencode

import click

__all__ = [
    "AmountCommand",
    "amounts_of",
    "json_option",
    "new_id",
    "reason_option",
    "reason_query",
    "validate_end",
    "validate_name",
    "validate_seconds",
    "watch_options",
]

_SECONDS_MAX = 86_400
_NEGATIVE = re.compile(r"-\.?[0-9]")

Command = TypeVar("Command", bound=Callable[..., Any])


class AmountCommand(click.Command):
    """A command with amounts as arguments. The error for ``-1`` is an invalid amount, not an unknown option."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse as Click does, with a specific error for a negative amount."""
        words = list(args)
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            negative = next((word for word in words if _NEGATIVE.match(word)), None)
            if negative is None or not negative.startswith(error.option_name):
                raise
        from ktrdr_budget.money import not_an_amount

        raise click.UsageError(str(not_an_amount(negative)), context)


def validate_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Click callback: accept the name of a budget or key, or an id. If the option is absent, accept ``None``.

    Raises:
        click.BadParameter: the value is neither a valid name nor a valid id.
    """
    return None if value is None else _name(value)


def validate_end(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Click callback: accept an instant with a timezone, ``window`` or ``never`` as the end of a limit.

    The callback returns ``None`` for ``never``.

    Raises:
        click.BadParameter: the value is none of these.
    """
    if value is None or value == "never":
        return None
    if value == "window":
        return value
    try:
        aware = datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        aware = False
    if not aware:
        raise click.BadParameter(f"must be an instant such as 2026-11-24T00:00:00Z, 'window' or 'never', not {value!r}")
    return value


def validate_seconds(least: float) -> Callable[[click.Context, click.Parameter, float | None], float | None]:
    """Make a Click callback that accepts seconds from ``least`` to a day. Unlike Click's range, it rejects NaN."""

    def check(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
        if value is None or least <= value <= _SECONDS_MAX:
            return value
        raise click.BadParameter(f"{value:g} is not from {least:g} to {_SECONDS_MAX} seconds")

    return check


def json_option(command: Command) -> Command:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the service's JSON.")(command)


def reason_option(command: Command) -> Command:
    """Add ``--reason``."""
    return click.option("--reason", default="", help="Why, for the log of changes.")(command)


def reason_query(reason: str) -> str:
    """The query with this reason, for requests without a body; empty without a reason."""
    return f"?{urlencode({'reason': reason})}" if reason else ""


def watch_options(command: Command) -> Command:
    """Add ``--json``, ``--watch`` and ``--interval``."""
    every: dict[str, Any] = {
        "metavar": "SECONDS",
        "default": 2.0,
        "callback": validate_seconds(0.1),
        "show_default": True,
    }
    command = click.option("--interval", **every, help="Seconds between two refreshes of --watch.")(command)
    command = click.option("--watch", is_flag=True, help="Refresh the output until Ctrl-C.")(command)
    text = "Print the service's JSON; with --watch, one line per refresh."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def amounts_of(words: Sequence[str]) -> dict[str, str]:
    """Parse the words ``NAME AMOUNT``, or one or more words of the form ``NAME=AMOUNT``.

    Raises:
        click.UsageError: the words have another form, or name a budget twice.
    """
    if len(words) == 2 and not any("=" in word for word in words):
        return {_name(words[0]): words[1]}
    if not words or not all("=" in word for word in words):
        raise click.UsageError("give NAME AMOUNT, or NAME=AMOUNT once or more")
    amounts: dict[str, str] = {}
    for word in words:
        name, _, amount = word.partition("=")
        if name in amounts:
            raise click.UsageError(f"budget {name!r} is given twice")
        amounts[_name(name)] = amount
    return amounts


def _name(text: str) -> str:
    from ktrdr_budget.errors import InvalidArgument
    from ktrdr_budget.models import check_name

    try:
        return check_name(text, "it")
    except InvalidArgument as error:
        raise click.BadParameter(str(error)) from None


def new_id(kind: str) -> str:
    """Generate an id for a request. If the reply is lost, the client can retry the request with the same id."""
    from secrets import token_hex

    return f"{kind}_{token_hex(8)}"
