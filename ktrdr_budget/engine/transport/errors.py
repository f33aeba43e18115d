"""Translation of failures into the errors of this package. A failure is an exception or an error reply."""

from __future__ import annotations

import os
import re
import ssl
from typing import NamedTuple

from ktrdr_budget.engine.protocol.scripts import without_script_location
from ktrdr_budget.engine.transport.connection import ReplyError
from ktrdr_budget.engine.transport.protocol_check import WrongProtocol
from ktrdr_budget.engine.transport.urls import Address
from ktrdr_budget.errors import StoreError, StoreUnavailable

__all__ = [
    "NoScript",
    "Redirection",
    "Transient",
    "answered",
    "is_temporary",
    "means_failover",
    "redirection",
    "translate",
    "unavailable",
    "without_secrets",
]

# Replies of a server that may soon reply otherwise: worth a retry within the deadline.
_TRANSIENT = re.compile(r"\b(LOADING|BUSY|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|READONLY|NOREPLICAS)\b")
# Of these, the replies of a server that may no longer be the primary, and of one that needs time.
_FAILOVER = re.compile(r"\b(CLUSTERDOWN|MASTERDOWN|READONLY)\b")
_TEMPORARY = re.compile(r"\b(LOADING|BUSY|TRYAGAIN|NOREPLICAS)\b")
# The first byte of HTTP, or of an HTML page that an HTTP server sends in reply to an invalid request.
_HTTP = re.compile(r"^Protocol (error, got|Error: b?)\W*[H<]")
_REDIRECTION = re.compile(r"(MOVED|ASK) \d+ (\S*):(\d+)")
_LOGIN = ("NOAUTH", "WRONGPASS")


class Transient(Exception):
    """The store did not reply, or replied with a temporary error, so that a retry may succeed.

    Args:
        sent: whether the request may have been executed.
        answered: whether the store has replied that it cannot serve the request now.
    """

    def __init__(self, message: str, sent: bool, *, answered: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.answered = answered


class NoScript(Exception):
    """The request was not executed; ``Store.apply`` can resend it.

    Either the server lacks the script, for example after a restart or a failover, or a cluster node sent a redirect.
    """


class Redirection(NamedTuple):
    """A redirect of a cluster node: permanent (MOVED), or for this request only (ASK), while a slot migrates."""

    host: str
    """The host of the target; empty if it is the host of the node that sent the redirect."""
    port: int
    asking: bool

    def address(self, redirecting: Address) -> Address:
        """The address of the target, given the address of the redirecting node."""
        return (self.host or redirecting[0], self.port)


def redirection(error: Exception) -> Redirection | None:
    """Parse MOVED and ASK, from an error reply or from redis-py's exception; ``None`` for any other error."""
    if isinstance(error, ReplyError):
        found = _REDIRECTION.match(str(error))
        return None if found is None else Redirection(found[2], int(found[3]), found[1] == "ASK")
    from redis.exceptions import AskError, MovedError

    if isinstance(error, AskError):
        return Redirection(str(error.host), int(error.port), not isinstance(error, MovedError))
    return None


def means_failover(error: Exception) -> bool:
    """Whether an error reply says that another server is the primary, or that there is none."""
    return _FAILOVER.search(_reply_text(error)) is not None


def is_temporary(error: Exception) -> bool:
    """Whether an error reply is temporary and does not mean that another server is the primary."""
    return _TEMPORARY.search(_reply_text(error)) is not None


def translate(error: Exception, shown: str) -> Exception:
    """Translate a failure into an error of this package; return any other error unchanged.

    Args:
        shown: the store's URL without secrets.
    """
    if isinstance(error, WrongProtocol):
        return StoreError(f"store at {shown}: {error}", fault="protocol")
    if isinstance(error, (OSError, EOFError)):
        return Transient(f"store at {shown}: {str(error) or type(error).__name__}", sent=True)

    from redis import exceptions as redis_errors

    text = f"store at {shown}: {without_secrets(error)}"
    if isinstance(error, redis_errors.NoScriptError) or str(error).startswith("NOSCRIPT"):
        return NoScript()
    refused = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
    # On a unix socket only the cause is of these classes. On a connection of our own the reply has no class at all.
    if isinstance(error, refused) or isinstance(error.__cause__, refused) or str(error).startswith(_LOGIN):
        return StoreError(text, fault="login")
    if redirection(error) is not None:
        return StoreError(f"store at {shown}: it is a node of a cluster; its URL must start with redis+cluster://")
    if isinstance(error, redis_errors.ClusterError) or _TRANSIENT.search(_reply_text(error)):
        return Transient(text, sent=False, answered=True)
    if isinstance(error, (redis_errors.ConnectionError, redis_errors.TimeoutError)):
        if " connecting to " in str(error):
            return Transient(f"cannot connect to {shown} ({_connect_failure(error)})", sent=False)
        return Transient(text, sent=True)
    if isinstance(error, (redis_errors.RedisError, ReplyError)):
        if _HTTP.search(str(error)):
            return StoreError(f"store at {shown}: it is not a Redis server: it speaks HTTP", fault="protocol")
        return StoreError(text)
    return error


def _connect_failure(error: Exception) -> str:
    """Why a connection could not be opened.

    The address is removed from the text of redis-py, because the error of this package already contains the URL.
    """
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ssl.SSLError):
        return without_secrets(cause)
    found = re.search(r"\bErrno (\d+)", str(cause)) if isinstance(cause, OSError) else None
    number = int(found[1]) if found is not None else getattr(cause, "errno", None)
    if isinstance(number, int) and number > 0:
        return os.strerror(number).lower()
    text = without_secrets(error)
    if text.startswith("Timeout"):
        return "timeout"
    return re.sub(r".*?connecting to (the store: |unix socket: \S+\. |\S+\. )?", "", text).rstrip(".") or "no reply"


def _reply_text(error: Exception) -> str:
    """The text of an error reply, beginning with the code.

    redis-py raises an exception class of its own for some codes, and removes such a code from the text.
    """
    name = type(error).__name__
    code = {"ReadOnlyError": "READONLY", "TryAgainError": "TRYAGAIN", "ClusterDownError": "CLUSTERDOWN"}
    code |= {"MasterDownError": "MASTERDOWN", "BusyLoadingError": "LOADING"}
    return f"{code.get(name, '')} {error}"


def without_secrets(error: Exception) -> str:
    """The first line of an error, at most 300 characters. If the line contains a URL, the login is masked."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"(\w+://)[^@\s/]*@", r"\1***@", without_script_location(line))[:300]


def answered(error: BaseException) -> bool:
    """Whether a failure is an error reply, which shows that the store is reachable."""
    return isinstance(error, StoreError) or (isinstance(error, Transient) and error.answered)


def unavailable(
    error: Exception | None, shown: str, timeout: float, *, ambiguous: bool = False, waited: str = ""
) -> StoreUnavailable:
    """The error for a call whose deadline has passed.

    Args:
        error: the last failure; ``None`` if the store replied and the call waited for another reason.
        timeout: the time that the call had, in seconds.
        waited: if ``error`` is ``None``, why the call waited; empty if the call waited for its turn.
    """
    if error is None:
        text = f"store at {shown}: {waited or 'the call waited for its turn'}; gave up after {timeout:g} s"
        return StoreUnavailable(text, ambiguous=ambiguous, reached=True)
    if isinstance(error, Transient):
        text = f"{error}; gave up after {timeout:g} s"
        return StoreUnavailable(text, ambiguous=ambiguous, reached=error.answered)
    return StoreUnavailable(f"store at {shown} sent no reply within {timeout:g} s", ambiguous=ambiguous)
