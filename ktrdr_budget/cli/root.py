"""The command ``ktrdr``: its groups, errors and exit codes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import click

from ktrdr_budget.cli.agent_commands import agent
from ktrdr_budget.cli.budget_commands import budget
from ktrdr_budget.cli.client import API_URL
from ktrdr_budget.cli.errors import CommandError, InvalidInput
from ktrdr_budget.cli.key_commands import key
from ktrdr_budget.cli.prices_command import prices
from ktrdr_budget.errors import InvalidArgument

__all__ = ["main"]

_EXIT_INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended. Shells expect this code."""

_HELP = tuple(filter(None, [getattr(click.exceptions, "NoArgsIsHelpError", None)]))
"""The exception of Click that shows the help of a group without a command. Earlier versions of Click exit instead."""


class _Root(click.Group):
    """The top group. It reports any error as one line on stderr and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit. With ``standalone_mode=False``, return or raise as Click's ``main`` does."""
        run = partial(super().main, args, prog_name, complete_var, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        sys.exit(_exit_code(run))


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        # Without standalone mode, Click returns the code of an early exit such as --help.
        result = run()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        shown = error if isinstance(error, (CommandError, *_HELP)) else CommandError(_message_of(error))
        shown.show()
        return error.exit_code
    except click.Abort:
        return _EXIT_INTERRUPTED
    except OSError as error:  # such as a full disk behind stdout; Click handles a closed pipe
        _drop_stdout()
        CommandError(error.strerror or str(error)).show()
        return CommandError.exit_code
    except Exception as error:
        CommandError(f"unexpected error, please report it: {type(error).__name__}: {error}").show()
        return CommandError.exit_code


def _drop_stdout() -> None:
    """Discard stdout. Otherwise, the interpreter would retry the failed write at exit, and report the error again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    finally:
        os.close(nowhere)


def _message_of(error: click.ClickException) -> str:
    """Return Click's message, followed by the command that shows help."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    more = f" (see '{context.command_path} --help')" if context else ""
    return error.format_message().rstrip(".") + more


# -- help --------------------------------------------------------------------------------------------------------------


class _Help(click.HelpFormatter):
    """Click's formatter, adapted to terminals narrower than its minimum of 52 columns."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = shutil.get_terminal_size().columns
        if width is None and columns < _CLICK_COLUMNS_MIN:
            width = max(columns, _COLUMNS_MIN)
        super().__init__(indent_increment, width, max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write a definition list. On a narrow terminal, the first column is at most a third of the width."""
        super().write_dl(
            rows, min(col_max, self.width // 3 if self.width < _CLICK_COLUMNS_MIN else col_max), col_spacing
        )


_CLICK_COLUMNS_MIN = 52
_COLUMNS_MIN = 24


class _Context(click.Context):
    formatter_class = _Help


def _fit_help(command: click.Command) -> None:
    """Fit the help of a command and its subcommands to the terminal."""
    command.context_class = _Context
    for inner in getattr(command, "commands", {}).values():
        _fit_help(inner)


# -- commands ----------------------------------------------------------------------------------------------------------


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ktrdr-budget", prog_name="ktrdr", message="%(prog)s %(version)s")
@click.option(
    "--api-url", metavar="URL", help="URL of the service.  [env: KTRDR_API_URL; default: http://127.0.0.1:8000]"
)
@click.pass_context
def main(context: click.Context, api_url: str | None) -> None:
    """One hard spend cap for every replica of a backend that runs LLM agents.

    KTRDR_API_KEY contains the use key of the service, and KTRDR_ADMIN_KEY the admin key, for example to set a limit. If
    NO_COLOR is set, the output has no colours.

    Exit codes: 0 success, 1 error, 2 wrong usage, 3 denied by a budget, 4 service or store unreachable.
    """
    from ktrdr_budget.environment import check_names

    try:
        check_names()
    except InvalidArgument as error:
        raise InvalidInput(str(error)) from None
    if api_url is not None:
        context.meta[API_URL] = api_url


main.add_command(agent)
main.add_command(budget)
main.add_command(key)
main.add_command(prices)


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="TCP port; 0 selects a free port."
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Number of worker processes.")
def serve(host: str, port: int, workers: int) -> None:
    """Run the service.

    The store is the server at KTRDR_REDIS_URL or, if the variable is not set, an embedded server with its data in
    AGENT_BUDGET_DIR.
    """
    try:
        from ktrdr_budget.api.serving import ServeError
        from ktrdr_budget.api.serving import serve as run
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from None  # the message names the package to install
    try:
        run(host=host, port=port, workers=workers)
    except ServeError as error:
        raise (InvalidInput if error.exit_code == InvalidInput.exit_code else CommandError)(str(error)) from None


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    Add the line for your shell to ~/.bashrc, ~/.zshrc, or ~/.config/fish/config.fish:

    \b
    bash  eval "$(ktrdr completion bash)"
    zsh   eval "$(ktrdr completion zsh)"
    fish  ktrdr completion fish | source
    """
    from click.shell_completion import get_completion_class

    name = context.find_root().info_name or "ktrdr"
    variable = f"_{name}_COMPLETE".replace("-", "_").upper()
    found = get_completion_class(shell)
    if found is None:
        raise CommandError(f"no completion for {shell}")
    click.echo(found(main, {}, name, variable).source())


_fit_help(main)
