"""The supervisor: a small process for one data directory, which keeps the embedded server running and stops it.

The *starter* is the user process that starts the supervisor. To *adopt* a server is to take over a running server that
an earlier supervisor has started.

Locks (``flock``) in the data directory say which processes are alive. The kernel releases a lock when its last holder
dies, however it dies, so no lock becomes stale, and no stored process id is trusted:

===================  =========================  =================================================================
``users.lock``       shared, each user          the supervisor gets an exclusive lock only if no user is left
``supervisor.lock``  exclusive, the supervisor  at most one supervisor; if the lock is free, a user must start one
``server.lock``      exclusive, the server      at most one server ever writes to the append-only file
===================  =========================  =================================================================

::

    start -> adopt or launch a server -> it replies to PING: report "ready" to the starter
                      ^                               |
                      |  back-off                     v
                      +----------------------- the server died
                                                      |  users.lock acquired: no user is left
                                                      v
                                         SHUTDOWN to the server; exit

The file is run by its path with ``python -I -S`` and imports only small parts of the standard library, since the first
user waits for it. :mod:`ktrdr_budget.engine.embedded.server` starts it and uses its helpers.
"""

# Without pathlib, whose import would double the time until this runs.
# ruff: noqa: PTH105, PTH116, PTH118, PTH123

import contextlib
import os
import signal
import socket
import sys
import threading
import time

StrPath = str | os.PathLike[str]

USERS_LOCK = "users.lock"
SUPERVISOR_LOCK = "supervisor.lock"
SERVER_LOCK = "server.lock"
LOG = "valkey.log"
READY = "ready"
REPORT_BYTES_MAX = 4096
"""A write of this length to a pipe is atomic (``PIPE_BUF`` on Linux; on macOS enough for a short line)."""

_PING_TIMEOUT_S = 1.0
_READY_POLL_S = 0.002
_STOP_TIMEOUT_S = 30.0
_STEADY_S = 5.0
"""A server that ran this long did not die at its start; its next restart is immediate."""
_BACKOFF_S = (0.0, 0.0, 0.1, 0.5, 1.0, 2.0)
"""The delay before a start, by how many servers in a row have died within :data:`_STEADY_S` of their start."""
_FAILED_STARTS_MAX = 5
_LOG_BYTES_MAX = 1 << 20


def open_lock(data_dir: StrPath, name: str) -> int:
    """Open a lock file, created for its owner only; raise ``OSError`` on failure. Symbolic links are not followed."""
    return os.open(os.path.join(data_dir, name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def try_lock(data_dir: StrPath, name: str, *, shared: bool = False) -> int | None:
    """Acquire a lock without waiting, and return its descriptor. Return ``None`` if the lock is held.

    The lock is released when the descriptor is closed.
    """
    import fcntl  # not at the top: this module must be importable on Windows, where it cannot run

    fd = open_lock(data_dir, name)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def wait_lock(data_dir: StrPath, name: str) -> int:
    """Block until the exclusive lock is acquired; return its descriptor."""
    import fcntl

    fd = open_lock(data_dir, name)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def query(socket_path: StrPath, command: bytes) -> bytes | None:
    """Send an inline command, and return the start of the reply.

    Return ``b""`` if the server closed the connection, and ``None`` if no server replied.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PING_TIMEOUT_S)
        connection.connect(os.fspath(socket_path))
        connection.sendall(command + b"\r\n")
        return connection.recv(64)
    return None


def is_ready(socket_path: StrPath) -> bool:
    """Whether a server replies at the socket and has loaded its data. While loading, a server replies ``-LOADING``."""
    return (query(socket_path, b"PING") or b"").startswith(b"+PONG")


def log_tail(data_dir: StrPath, *, offset: int = 0, lines: int = 3) -> str:
    """The last lines of the server's log after a byte offset, joined into one line. Empty if there is no log."""
    try:
        with open(os.path.join(data_dir, LOG), "rb") as log:
            log.seek(max(offset, log.seek(0, os.SEEK_END) - 4096))
            written = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return " | ".join([line.strip() for line in written if line.strip()][-lines:])


class Supervisor:
    """Runs one server for the users of a data directory, which is the working directory."""

    def __init__(self, data_dir: str, socket_path: str, binary: str, report_fd: int) -> None:
        self._data_dir = data_dir
        self._socket_path = socket_path
        self._binary = binary
        self._report_fd: int | None = report_fd
        self._server_pid: int | None = None
        self._log_offset = 0
        self._stopping = threading.Event()
        self._server_died = threading.Event()
        # Held during every launch, reaping and signal, so that no server starts after the last user has left,
        # and no signal is sent to a process id that has been reaped.
        self._mutex = threading.Lock()

    def run(self) -> None:
        """Keep a server running until its last user has left, or until it cannot be started.

        Report ``ready`` to the starter, or why the first start failed. A failed first start is not retried, unless the
        server was killed.
        """
        threading.Thread(target=self._stop_after_last_user, daemon=True).start()
        early_deaths = failed_starts = 0
        while failed_starts < _FAILED_STARTS_MAX and not self._stopping.wait(_backoff_s(early_deaths)):
            started_s = time.monotonic()
            self._launch_unless_alive()
            ready = self._await_ready()
            if ready:
                self.report(READY)
            exited = self._await_death()
            if exited and self._report_fd is not None:
                break
            failed_starts = 0 if ready else failed_starts + 1
            early_deaths = early_deaths + 1 if time.monotonic() - started_s < _STEADY_S else 0
        self.report(f"the server did not start: {log_tail(self._data_dir, offset=self._log_offset)}")

    def report(self, text: str) -> None:
        """Send a report to the starter, which may have died. Only the first report is sent."""
        if self._report_fd is None:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._report_fd, text.encode()[:REPORT_BYTES_MAX])
        os.close(self._report_fd)
        self._report_fd = None

    def _launch_unless_alive(self) -> None:
        """Start a server, or adopt one that an earlier supervisor has left running."""
        self._server_died.clear()
        lock_fd = try_lock(self._data_dir, SERVER_LOCK)
        if lock_fd is None:
            return
        try:
            with self._mutex:
                if self._stopping.is_set():
                    return
                self._log_offset = _prepare_log()
                os.set_inheritable(lock_fd, True)  # the server holds the lock, also after the death of this process
                self._server_pid = os.posix_spawn(self._binary, self._command(), dict(os.environ))
        finally:
            os.close(lock_fd)

    def _command(self) -> list[str]:
        """The server's command line: a unix socket and no port; every write goes to the append-only file."""
        options = {
            "port": "0",
            "unixsocket": self._socket_path,
            "unixsocketperm": "700",
            "logfile": LOG,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "aof-load-truncated": "yes",
            "aof-use-rdb-preamble": "yes",
            "maxmemory-policy": "noeviction",
        }
        return [self._binary, *(word for name, value in options.items() for word in (f"--{name}", value))]

    def _is_alive(self) -> bool:
        lock_fd = try_lock(self._data_dir, SERVER_LOCK)
        if lock_fd is None:
            return True
        os.close(lock_fd)
        return False

    def _await_ready(self) -> bool:
        """Wait until the server replies. Return false if it dies without a reply, or if its last user leaves."""
        while not self._stopping.wait(_READY_POLL_S):
            if is_ready(self._socket_path):
                return True
            if not self._is_alive():
                return False
        return False

    def _await_death(self) -> bool:
        """Wait until the server has died. Return whether the server was a child of this process and was not killed."""
        os.close(wait_lock(self._data_dir, SERVER_LOCK))
        exited = False
        with self._mutex:
            if self._server_pid is not None:
                exited = os.WIFEXITED(os.waitpid(self._server_pid, 0)[1])
                self._server_pid = None
            self._server_died.set()
        return exited

    def _stop_after_last_user(self) -> None:
        """Wait until the last user has left, then stop the server.

        The lock is held until this process exits, so a new user waits until the server has written everything, and then
        starts another supervisor.
        """
        wait_lock(self._data_dir, USERS_LOCK)
        self._stopping.set()
        query(
            self._socket_path, b"SHUTDOWN"
        )  # stops it at once; it handles a signal only at its next tick, every 0.1 s
        self._signal(signal.SIGTERM)  # the server may be too busy to reply, or still loading
        if not self._server_died.wait(_STOP_TIMEOUT_S):
            self._signal(signal.SIGKILL)
            # An adopted server that hangs cannot be killed safely; the next supervisor adopts it again.
            self._server_died.wait(_PING_TIMEOUT_S)
            os._exit(1)

    def _signal(self, number: signal.Signals) -> None:
        with self._mutex:
            if self._server_pid is not None:
                os.kill(self._server_pid, number)


def _backoff_s(early_deaths: int) -> float:
    return _BACKOFF_S[min(early_deaths, len(_BACKOFF_S) - 1)]


def _prepare_log() -> int:
    """Rename a large log, redirect the output of this process to the log, and return the size of the log in bytes."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(LOG).st_size > _LOG_BYTES_MAX:
            os.replace(LOG, f"{LOG}.1")
    log_fd = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    size = os.fstat(log_fd).st_size
    os.close(log_fd)
    return size


def _detach() -> None:
    """Detach from the starter, and reset the inherited signal settings.

    A detached supervisor leaves no zombie in a long-lived starter. Signals of a terminal or of a service manager do not
    stop the supervisor, since users that are still finishing need the server. These signals get a no-op handler,
    because the server would inherit ``SIG_IGN``. The starter may ignore ``SIGCHLD`` or block signals. Both settings are
    reset, because the server does not work with them.
    """
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        signal.signal(getattr(signal, name), lambda number, frame: None)


def main(arguments: list[str]) -> None:
    """Run the supervisor. Arguments: data directory, socket path, server binary, lock and report descriptors.

    The descriptor of ``supervisor.lock`` is inherited and locked, so that no other user can start a second supervisor
    between the starter's check and the start of this process.
    """
    data_dir, socket_path, binary, lock_fd, report_fd = arguments
    _detach()
    os.set_inheritable(int(lock_fd), False)
    os.set_inheritable(int(report_fd), False)
    supervisor = Supervisor(data_dir, socket_path, binary, int(report_fd))
    try:
        supervisor.run()
    except OSError as exc:
        supervisor.report(f"the server did not start: {exc}")
    # In this order: a new user that acquires users.lock, released at exit, must find supervisor.lock free.
    os.close(int(lock_fd))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
