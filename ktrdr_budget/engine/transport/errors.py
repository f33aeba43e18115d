"""What a failure of the driver, or an error that a server answers, means for the caller."""

from __future__ import annotations

import os
import re
import ssl
from typing import NamedTuple

from ktrdr_budget.engine.transport.connection import ReplyError
from ktrdr_budget.engine.transport.urls import Address
from ktrdr_budget.engine.transport.wrong_protocol import WrongProtocol
from ktrdr_budget.errors import StoreError, StoreUnavailable

__all__ = [
    "NoScript",
    "Redirection",
    "Transient",
    "answered",
    "doubtful",
    "meaning",
    "needs_time",
    "redirection",
    "unavailable",
    "without_secrets",
]

# Answers of a store that will soon answer otherwise: worth another try within the deadline.
_PASSING = re.compile(r"\b(LOADING|BUSY|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|READONLY|NOREPLICAS)\b")
# Those of a server that may not be the right one any more, and those of one that is, and needs time.
_DOUBTFUL = re.compile(r"\b(CLUSTERDOWN|MASTERDOWN|READONLY)\b")
_PATIENT = re.compile(r"\b(LOADING|BUSY|TRYAGAIN|NOREPLICAS)\b")
# The first byte of HTTP, or of the page that an HTTP server sends to a request that it does not understand.
_NOT_REDIS = re.compile(r"^Protocol (error, got|Error: b?)\W*[H<]")
_REDIRECTION = re.compile(r"(MOVED|ASK) \d+ (\S*):(\d+)")


class Transient(Exception):
    """The store did not answer, or not yet: another try may help.

    Args:
        sent: the request may have been executed.
        answered: the store is there, and has answered that it cannot do this now.
    """

    def __init__(self, message: str, sent: bool, *, answered: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.answered = answered


class NoScript(Exception):
    """Nothing was executed, and ``Store.apply`` knows what to do: the store does not have the script (a restart,
    SCRIPT FLUSH, another node), or a node of a cluster has named another."""


class Redirection(NamedTuple):
    """A node of a cluster names another: for good, or ``asking`` it for this request only, while a slot is moving."""

    host: str
    """Empty if it is that of the node that answered."""
    port: int
    asking: bool

    def address(self, answered: Address) -> Address:
        """Where to."""
        return (self.host or answered[0], self.port)


def redirection(error: Exception) -> Redirection | None:
    """Reads MOVED and ASK, in the server's words or in redis-py's."""
    if isinstance(error, ReplyError):
        found = _REDIRECTION.match(str(error))
        return None if found is None else Redirection(found[2], int(found[3]), found[1] == "ASK")
    from redis.exceptions import AskError, MovedError

    if isinstance(error, AskError):
        return Redirection(str(error.host), int(error.port), not isinstance(error, MovedError))
    return None


def doubtful(error: Exception) -> bool:
    """Whether an error is a server's word that somebody else is in charge, or nobody."""
    return _DOUBTFUL.search(_words(error)) is not None


def needs_time(error: Exception) -> bool:
    """Whether an error is a server's word that it will answer later."""
    return _PATIENT.search(_words(error)) is not None


def meaning(error: Exception, shown: str) -> Exception:
    """An error of this package instead of the driver's; what is neither remains.

    Args:
        shown: where the store is, without secrets.
    """
    if isinstance(error, WrongProtocol):
        return StoreError(f"store at {shown}: {error}")
    if isinstance(error, (OSError, EOFError)):
        return Transient(f"store at {shown}: {str(error) or type(error).__name__}", sent=True)

    from redis import exceptions as redis_errors

    text = f"store at {shown}: {without_secrets(error)}"
    if isinstance(error, redis_errors.NoScriptError) or str(error).startswith("NOSCRIPT"):
        return NoScript()
    refused = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
    if isinstance(error, refused) or isinstance(error.__cause__, refused):  # on a unix socket, only the cause
        return StoreError(text)
    if redirection(error) is not None:
        return StoreError(f"store at {shown}: it is a node of a cluster; its URL must start with redis+cluster://")
    if isinstance(error, redis_errors.ClusterError) or _PASSING.search(_words(error)):
        return Transient(text, sent=False, answered=True)
    lost = (redis_errors.ConnectionError, redis_errors.TimeoutError)
    if isinstance(error, lost):
        if " connecting to " in str(error):
            return Transient(f"cannot connect to {shown} ({_reason(error)})", sent=False)
        return Transient(text, sent=True)
    if isinstance(error, (redis_errors.RedisError, ReplyError)):
        if _NOT_REDIS.search(str(error)):
            text = f"store at {shown}: it is not a Redis server: it answered HTTP"
        return StoreError(text)
    return error


def _reason(error: Exception) -> str:
    """Why a connection could not be made, without the address, which redis-py repeats."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ssl.SSLError):
        return without_secrets(cause)
    found = re.search(r"\bErrno (\d+)", str(cause)) if isinstance(cause, OSError) else None
    number = int(found[1]) if found is not None else getattr(cause, "errno", None)
    if isinstance(number, int) and number > 0:
        return os.strerror(number).lower()
    words = without_secrets(error)
    if words.startswith("Timeout"):
        return "timeout"
    return re.sub(r".*?connecting to (the store: |unix socket: \S+\. |\S+\. )?", "", words).rstrip(".") or "no reply"


def _words(error: Exception) -> str:
    """What the server said; redis-py makes a class of some first words, and takes them away."""
    name = type(error).__name__
    first = {"ReadOnlyError": "READONLY", "TryAgainError": "TRYAGAIN", "ClusterDownError": "CLUSTERDOWN"}
    first |= {"MasterDownError": "MASTERDOWN", "BusyLoadingError": "LOADING"}
    return f"{first.get(name, '')} {error}"


def without_secrets(error: Exception) -> str:
    """An error's first line; servers and drivers put no password there, but a URL may have got in."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    line = re.sub(r",? script: [^:]*on @user_script.*", "", line)  # where in a script; nobody outside knows its lines
    return re.sub(r"(\w+://)[^@\s/]*@", r"\1***@", line)[:300]


def answered(error: BaseException) -> bool:
    """Whether a failure is an answer: the store is there."""
    return isinstance(error, StoreError) or (isinstance(error, Transient) and error.answered)


def unavailable(
    error: Exception | None, shown: str, timeout: float, *, ambiguous: bool = False, waited: str = ""
) -> StoreUnavailable:
    """What a caller gets when its deadline has passed.

    Args:
        error: the last failure; ``None`` if the store answers, and the call waited for something else.
        waited: for what.
    """
    if error is None:
        text = f"store at {shown}: {waited or 'the call waited for its turn'}; gave up after {timeout:g} s"
        return StoreUnavailable(text, ambiguous=ambiguous, reached=True)
    if isinstance(error, Transient):
        text = f"{error}; gave up after {timeout:g} s"
        return StoreUnavailable(text, ambiguous=ambiguous, reached=error.answered)
    return StoreUnavailable(f"store at {shown} gave no answer within {timeout:g} s", ambiguous=ambiguous)
