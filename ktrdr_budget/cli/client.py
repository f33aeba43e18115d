"""The HTTP client of the commands. An error is reported as one line.

The client uses the standard library, because importing ``httpx`` takes longer than the rest of ``ktrdr agent budget``.
The client ignores the proxies of the environment, because the service usually runs nearby. The client follows no
redirects, because a redirect could leak the key.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import click

from ktrdr_budget.cli.errors import CommandError, Denied, InvalidInput, Unreachable
from ktrdr_budget.cli.output import amount_text, duration, one_line

if TYPE_CHECKING:
    from http.client import HTTPConnection

__all__ = ["API_URL", "Answer", "Service", "expect_valid_response", "segment", "service"]

API_URL = "ktrdr_budget.api_url"
"""The name under which ``click.Context.meta`` has the service's URL."""

URL_DEFAULT = "http://127.0.0.1:8000"
TIMEOUT_S = 5.0
_NOT_STARTED = ((429, "budget_exhausted"), (409, "active_cycle_exists"))
"""The status and the reason of each reply that denies a trigger."""
_KEY = re.compile(r"[\x21-\x7e]{1,4096}", re.ASCII)


class Answer(NamedTuple):
    """A successful reply of the service."""

    text: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON object, with fractions as ``Decimal``."""
        return json.loads(self.text, parse_float=Decimal)  # type: ignore[no-any-return]


class Service(NamedTuple):
    """The address of the service: scheme, host, port, and the path before ``/api/v1``."""

    scheme: str
    host: str
    port: int | None
    prefix: str

    @classmethod
    def at(cls, url: str) -> Service:
        """Parse the URL of a service.

        Raises:
            InvalidInput: the URL is not ``http`` or ``https``, has no host, or has a user, query or fragment.
        """
        if "@" in url:  # checked before any message quotes the URL, which may contain a password
            raise InvalidInput("the service's URL must not contain a user or password; set KTRDR_API_KEY instead")
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidInput(f"invalid URL of the service: {error}") from None
        if parts.scheme not in ("http", "https"):
            raise InvalidInput(f"the service's URL must begin with http:// or https://, not {url!r}")
        if not host or parts.query or parts.fragment or not (parts.path.isascii() and parts.path.isprintable()):
            raise InvalidInput(f"invalid URL of the service: {url!r}")
        return cls(parts.scheme, host, port, parts.path.rstrip("/").replace(" ", "%20"))

    @property
    def url(self) -> str:
        """The URL, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{'' if self.port is None else f':{self.port}'}{self.prefix}"

    def get(self, path: str, *, admin: bool = False, **query: object) -> Answer:
        """Send a GET request for the path after ``/api/v1``. Query parameters that are ``None`` are not sent."""
        given = {name: value for name, value in query.items() if value is not None}
        return self.send("GET", f"{path}?{urlencode(given)}" if given else path, admin=admin)

    def send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, admin: bool = False, repeat: str = ""
    ) -> Answer:
        """Send a request and return a successful reply.

        Args:
            method: HTTP method.
            path: path after ``/api/v1``, percent-encoded.
            body: JSON body.
            admin: whether to send the admin key, if one is set.
            repeat: advice on a safe retry. The error shows the advice only if the request may have taken effect.

        Raises:
            Denied, Unreachable, InvalidInput, CommandError: the request failed. The class sets the exit code.
        """
        headers = {"Accept": "application/json, application/problem+json", "Connection": "close", **_key(admin)}
        if body is not None:
            headers["Content-Type"] = "application/json"
        content = None if body is None else json.dumps(body).encode()
        status, text = self._exchange(method, f"{self.prefix}/api/v1{path}", content, headers, repeat)
        document = _object(text)
        if 200 <= status < 300 and document is not None:
            return Answer(text)
        raise self._error_of(status, document, admin, repeat)

    def _exchange(
        self, method: str, target: str, content: bytes | None, headers: dict[str, str], repeat: str
    ) -> tuple[int, str]:
        from http.client import HTTPException, IncompleteRead, RemoteDisconnected

        connection = self._connection()
        try:
            connection.connect()
        except UnicodeError:
            raise InvalidInput(f"invalid host name: {self.host!r}") from None
        except OSError as error:
            reason = error.strerror or error
            hint = "start it with 'ktrdr serve', or set KTRDR_API_URL to its address"
            raise Unreachable(f"cannot reach the service at {self.url}: {reason}; {hint}") from None
        try:
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        except TimeoutError:
            raise Unreachable(f"no reply from the service at {self.url} within {TIMEOUT_S:g} s{repeat}") from None
        except (OSError, IncompleteRead, RemoteDisconnected):
            raise Unreachable(f"the service at {self.url} closed the connection during its reply{repeat}") from None
        except HTTPException:
            raise CommandError(f"the server at {self.url} does not speak HTTP") from None
        finally:
            connection.close()

    def _connection(self) -> HTTPConnection:
        from http.client import HTTPConnection, HTTPSConnection

        if self.scheme == "http":
            return HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)
        import ssl

        return HTTPSConnection(self.host, self.port, timeout=TIMEOUT_S, context=ssl.create_default_context())

    def _error_of(self, status: int, problem: dict[str, Any] | None, admin: bool, repeat: str) -> CommandError:
        """Convert an unsuccessful reply to an error."""
        error = Unreachable if status in (502, 503, 504) else InvalidInput if status == 422 else CommandError
        if problem is None or status < 400:
            words = f"the reply of {self.url} with status {status} is not from a ktrdr-budget service; check the URL"
            return error(words + (repeat if status in (502, 504) else ""))
        if (status, problem.get("reason")) in _NOT_STARTED and problem.get("triggered") is False:
            with expect_valid_response(self):
                return Denied(_not_started_line(problem), problem)
        if status == 429 and "budget" not in problem and "retry_after" in problem:
            with expect_valid_response(self):
                return Denied(f"{one_line(problem['detail'])}; {_advice(problem['retry_after'])}", problem)
        if status == 429 and "reason" in problem:
            with expect_valid_response(self):
                return Denied(denial_line(problem), problem)
        detail = one_line(problem.get("detail") or problem.get("title") or f"the service replied {status}")
        if status == 401:
            detail += f" (set {'KTRDR_ADMIN_KEY' if admin else 'KTRDR_API_KEY'} to a key of the service)"
        if status == 403 and admin:
            detail += " (needs the service's admin key in KTRDR_ADMIN_KEY)"
        ambiguous = error is Unreachable and problem.get("ambiguous") is not False
        return error(detail + (repeat if ambiguous else ""), problem)


def service() -> Service:
    """Return the service whose URL is given by ``--api-url``, an enclosing command line, or ``KTRDR_API_URL``."""
    given = click.get_current_context().meta.get(API_URL)
    return Service.at(given or os.environ.get("KTRDR_API_URL", "").strip() or URL_DEFAULT)


def segment(name: str) -> str:
    """Encode a name or id as one segment of a path."""
    return quote(name, safe="")


@contextmanager
def expect_valid_response(service: Service) -> Iterator[None]:
    """Raise ``CommandError`` if the block fails because a reply of the service has an unexpected shape."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        raise CommandError(f"the reply of {service.url} is not from a ktrdr-budget service; check the URL") from None


def denial_line(problem: Mapping[str, Any]) -> str:
    """Return a line such as ``agent: budget_exhausted ($0.10 remaining, need $0.15); retry in 17 h 32 min``."""
    unit = "" if isinstance(problem["requested"], str) or "unit" not in problem else f" {problem['unit']}"
    remaining, need = (amount_text(problem[name]) + unit for name in ("remaining", "requested"))
    text = f"{problem['budget']}: {problem['reason']} ({remaining} remaining, need {need})"
    return f"{text}; {_advice(problem['retry_after'])}"


def _not_started_line(problem: Mapping[str, Any]) -> str:
    """Return the message for a denied trigger. If the reply has ``retry_after``, the message says when to retry."""
    text = one_line(problem["message"])
    if "retry_after" not in problem:
        return text
    # An estimate above the limit never fits. The service's retry_after is the next day, when the limit may differ.
    seconds = None if problem.get("denial_reason") == "exceeds_limit" else problem["retry_after"]
    return f"{text}; {_advice(seconds)}"


def _advice(seconds: Any) -> str:
    return "a retry cannot succeed" if seconds is None else f"retry in {duration(int(seconds))}"


def _object(text: str) -> dict[str, Any] | None:
    try:
        document = json.loads(text, parse_float=Decimal)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _key(admin: bool) -> dict[str, str]:
    """Return the header with a key from the environment, or no header if no key is set. No message shows the key.

    If only one of ``KTRDR_API_KEY`` and ``KTRDR_ADMIN_KEY`` is set, its key is sent with all requests. If a variable
    has several keys, separated by commas, the first key is sent.

    Args:
        admin: prefer the admin key. Default: prefer the use key.
    """
    names = ("KTRDR_ADMIN_KEY", "KTRDR_API_KEY") if admin else ("KTRDR_API_KEY", "KTRDR_ADMIN_KEY")
    for name in names:
        keys = [key for key in map(str.strip, os.environ.get(name, "").split(",")) if key]
        if not keys:
            continue
        if not _KEY.fullmatch(keys[0]):
            raise InvalidInput(f"{name} is not a valid key: it must be one word of printable ASCII characters")
        return {"Authorization": f"Bearer {keys[0]}"}
    return {}
