"""Arguments that several commands take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import click

__all__ = [
    "AmountCommand",
    "amounts_of",
    "json_option",
    "new_id",
    "validate_end",
    "validate_name",
    "validate_seconds",
    "watch_options",
]

_SECONDS_MAX = 86_400
_NEGATIVE = re.compile(r"-\.?[0-9]")

Command = TypeVar("Command", bound=Callable[..., Any])


class AmountCommand(click.Command):
    """A command whose arguments are amounts: a negative one is an amount that is not usable, and no unknown option."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """As Click does, with another error for a negative amount."""
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
    """Callback: a budget name or an id, by the rule of the library; an option may be absent.

    Raises:
        click.BadParameter: it is neither.
    """
    return None if value is None else _name(value)


def validate_end(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Callback: the end of a limit, an instant with its timezone or ``window``; ``None`` for ``never``.

    Raises:
        click.BadParameter: it is neither.
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
        raise click.BadParameter(
            f"{value!r} is neither an instant such as 2026-11-24T00:00:00Z nor 'window' or 'never'"
        )
    return value


def validate_seconds(least: float) -> Callable[[click.Context, click.Parameter, float | None], float | None]:
    """Callback: seconds from ``least`` to a day; unlike Click's range it takes no NaN."""

    def check(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
        if value is None or least <= value <= _SECONDS_MAX:
            return value
        raise click.BadParameter(f"{value:g} is not from {least:g} to {_SECONDS_MAX} seconds")

    return check


def json_option(command: Command) -> Command:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="The service's JSON.")(command)


def watch_options(command: Command) -> Command:
    """``--json``, ``--watch`` and ``--interval``."""
    every = {"metavar": "SECONDS", "default": 2.0, "callback": validate_seconds(0.1), "show_default": True}
    command = click.option("--interval", **every, help="How often --watch asks.")(command)  # type: ignore[arg-type]
    command = click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")(command)
    text = "The service's JSON; with --watch one line each time."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def amounts_of(words: Sequence[str]) -> dict[str, str]:
    """The amounts of ``NAME AMOUNT``, or of ``NAME=AMOUNT`` given once or more.

    Raises:
        click.UsageError: neither, or a budget twice.
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
    """An id of our own, so that a call whose answer is lost can be repeated as the same call."""
    from secrets import token_hex

    return f"{kind}_{token_hex(8)}"
