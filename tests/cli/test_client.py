"""The HTTP client: each kind of reply or failure gives one line and its exit code."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from click.testing import Result

from ktrdr_budget.cli import client
from ktrdr_budget.cli.client import Service, denial_line
from ktrdr_budget.cli.errors import InvalidInput

from ..helpers.waiting import wait_until
from .support import BUDGET, DENIAL, STATUS, FakeService, Request, problem

Run = Callable[..., Result]
BUDGET_CALL = "GET /api/v1/agent/budget"


def failed(result: Result, exit_code: int) -> str:
    """Return the one line on stderr."""
    assert result.exit_code == exit_code, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert isinstance(result.exception, SystemExit), result.exception
    return result.stderr.rstrip("\n")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        (" https://budget.example/ktrdr/ ", "https://budget.example/ktrdr"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("HTTP://localhost", "http://localhost"),
    ],
)
def test_the_url_of_the_service_is_normalized(url: str, shown: str) -> None:
    assert Service.at(url).url == shown


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1",
        "redis://127.0.0.1:6379",
        "127.0.0.1:8000",
        "localhost:8000",
        "http://",
        "http:///path",
        "http://host:port",
        "http://host:99999",
        "http://host/?a=b",
        "http://host/#a",
        "http://host/caf\xe9",
        "http://[::1",
    ],
)
def test_an_invalid_url_is_a_usage_error(ktrdr: Run, url: str) -> None:
    assert "URL" in failed(ktrdr("--api-url", url, "agent", "budget"), 2)


@pytest.mark.parametrize("password", ["hunter2", "hunter2/x", "hunter2#x"])
def test_a_password_in_the_url_is_rejected_and_not_shown(
    ktrdr: Run, environment: pytest.MonkeyPatch, password: str
) -> None:
    environment.setenv("KTRDR_API_URL", f"http://user:{password}@127.0.0.1:8000")
    line = failed(ktrdr("agent", "budget"), 2)
    assert "KTRDR_API_KEY" in line
    assert "hunter2" not in line


def test_an_invalid_host_name_is_a_usage_error(ktrdr: Run) -> None:
    assert "host" in failed(ktrdr("--api-url", f"http://{'a' * 70}.example", "agent", "budget"), 2)


def test_the_option_api_url_overrides_the_environment_variable(
    ktrdr: Run, service: FakeService, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("KTRDR_API_URL", "http://127.0.0.1:1")
    assert ktrdr("--api-url", service.url, "agent", "budget").exit_code == 0


def test_a_request_path_begins_with_the_path_of_the_configured_url(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /team/quant/api/v1/agent/budget", STATUS)
    assert ktrdr("--api-url", f"{service.url}/team/quant/", "agent", "budget").exit_code == 0


def test_proxy_variables_in_the_environment_are_ignored(ktrdr: Run, environment: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        environment.setenv(name, "http://127.0.0.1:1")
    assert ktrdr("agent", "budget").exit_code == 0


# --- Keys -----------------------------------------------------------------------------------------


def authorization(service: FakeService) -> str | None:
    return service.requests[-1].headers.get("Authorization")


def test_no_authorization_header_is_sent_without_a_key(ktrdr: Run, service: FakeService) -> None:
    ktrdr("agent", "budget")
    assert authorization(service) is None


def test_the_admin_key_is_sent_only_with_settlements_and_changes_and_access_keys(
    ktrdr: Run, service: FakeService, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("KTRDR_API_KEY", "use-key")
    environment.setenv("KTRDR_ADMIN_KEY", "admin-key")
    sent = {}
    for words in (
        ("agent", "budget"),
        ("budget", "list"),
        ("budget", "reserve", "agent", "1"),
        ("budget", "commit", "op_1"),
        ("budget", "record", "agent", "1"),
        ("budget", "release", "op_1"),
        ("budget", "set-limit", "agent", "1"),
        ("budget", "clear-limit", "agent"),
        ("budget", "migrate", "agent"),
        ("budget", "changes"),
        ("key", "create", "ci"),
        ("key", "revoke", "ci"),
    ):
        ktrdr(*words)
        sent[words[1]] = authorization(service)
    admin = {"commit", "release", "set-limit", "clear-limit", "migrate", "changes", "create", "revoke"}
    assert sent == {word: f"Bearer {'admin' if word in admin else 'use'}-key" for word in sent}
    ktrdr("key", "list")
    assert authorization(service) == "Bearer admin-key"


@pytest.mark.parametrize("name", ["KTRDR_API_KEY", "KTRDR_ADMIN_KEY"])
@pytest.mark.parametrize("words", [("agent", "budget"), ("budget", "clear-limit", "agent")])
def test_the_only_configured_key_is_sent_with_all_requests(
    ktrdr: Run, service: FakeService, environment: pytest.MonkeyPatch, name: str, words: tuple[str, ...]
) -> None:
    environment.setenv(name, "the-key")
    ktrdr(*words)
    assert authorization(service) == "Bearer the-key"


def test_the_first_of_several_keys_is_sent(ktrdr: Run, service: FakeService, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("KTRDR_API_KEY", " ,one , two")
    ktrdr("agent", "budget")
    assert authorization(service) == "Bearer one"


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "clé", "x" * 5000])
def test_a_usage_error_about_an_invalid_key_does_not_show_the_key(
    ktrdr: Run, environment: pytest.MonkeyPatch, key: str
) -> None:
    environment.setenv("KTRDR_API_KEY", key)
    line = failed(ktrdr("agent", "budget"), 2)
    assert line.startswith("ktrdr: KTRDR_API_KEY")
    assert key not in line


KEY_HINTS = [
    (401, ("agent", "budget"), " (set KTRDR_API_KEY to a key of the service)"),
    (401, ("budget", "clear-limit", "agent"), " (set KTRDR_ADMIN_KEY to a key of the service)"),
    (403, ("agent", "budget"), ""),
    (403, ("budget", "clear-limit", "agent"), " (needs the service's admin key in KTRDR_ADMIN_KEY)"),
]


@pytest.mark.parametrize(("status", "words", "hint"), KEY_HINTS)
def test_after_a_refusal_the_error_names_the_variable_for_a_key_that_would_be_accepted(
    ktrdr: Run, service: FakeService, status: int, words: tuple[str, ...], hint: str
) -> None:
    refused = problem(status, "Refused", "not with this key")[1]
    service.answer(BUDGET_CALL, refused, status)
    service.answer("DELETE /api/v1/budgets/agent/limit", refused, status)
    assert failed(ktrdr(*words), 1) == f"ktrdr: not with this key{hint}"


# --- Replies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "exit_code"),
    [(400, 1), (404, 1), (405, 1), (409, 1), (422, 2), (429, 1), (500, 1), (502, 4), (503, 4), (504, 4)],
)
def test_the_exit_code_depends_on_the_http_status_of_the_error_reply(
    ktrdr: Run, service: FakeService, status: int, exit_code: int
) -> None:
    service.answer(BUDGET_CALL, problem(status, "Title", "what is\nwrong")[1], status)
    assert failed(ktrdr("agent", "budget"), exit_code) == "ktrdr: what is wrong"


@pytest.mark.parametrize(
    ("document", "line"),
    [({"title": "Conflict"}, "Conflict"), ({}, "the service replied 409"), ({"detail": ["a", 1]}, "['a', 1]")],
)
def test_an_error_reply_without_a_valid_detail_is_reported_in_one_line(
    ktrdr: Run, service: FakeService, document: object, line: str
) -> None:
    service.answer(BUDGET_CALL, document, 409)
    assert failed(ktrdr("agent", "budget"), 1) == f"ktrdr: {line}"


def test_a_long_detail_of_an_error_is_shortened_to_one_line_without_control_characters(
    ktrdr: Run, service: FakeService
) -> None:
    service.answer(BUDGET_CALL, {"detail": "\x1b[2J" + "x" * 10_000}, 500)
    line = failed(ktrdr("agent", "budget"), 1)
    assert len(line) < 500
    assert "\x1b" not in line


GARBAGE = ["<html><body>It works!</body></html>", "", "{", '{"date": "2026-11-2', "[]", "null", "5", "[" * 100_000]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_reply_without_a_json_object_is_an_error(ktrdr: Run, service: FakeService, text: str, status: int) -> None:
    service.answer(BUDGET_CALL, text, status)
    line = failed(ktrdr("agent", "budget"), 1)
    assert (
        line
        == f"ktrdr: the reply of {service.url} with status {status} is not from a ktrdr-budget service; check the URL"
    )


@pytest.mark.parametrize(("ambiguous", "hint"), [(True, True), (False, False), (None, True)])
def test_retry_advice_is_shown_only_if_the_call_may_have_taken_effect(
    ktrdr: Run, service: FakeService, ambiguous: bool | None, hint: bool
) -> None:
    document = {**problem(503, "Unavailable", "the store is down")[1], "ambiguous": ambiguous}
    service.answer("POST /api/v1/spend", {k: v for k, v in document.items() if v is not None}, 503)
    line = failed(ktrdr("budget", "record", "agent", "0.15", "--id", "op_1"), 4)
    words = "; the request may have taken effect: repeating the request with --id op_1 is safe"
    assert line == "ktrdr: the store is down" + (words if hint else "")


def test_retry_advice_is_shown_after_an_error_of_a_gateway(ktrdr: Run, service: FakeService) -> None:
    service.answer("POST /api/v1/spend", "<html>Bad Gateway</html>", 502)
    line = failed(ktrdr("budget", "record", "agent", "0.15", "--id", "op_1"), 4)
    assert line.endswith("; the request may have taken effect: repeating the request with --id op_1 is safe")


def test_a_gateway_error_in_html_has_the_exit_code_of_an_unreachable_service(ktrdr: Run, service: FakeService) -> None:
    service.answer(BUDGET_CALL, "<html>Bad Gateway</html>", 502)
    failed(ktrdr("agent", "budget"), 4)


@pytest.mark.parametrize("status", [204, 301, 307])
def test_a_redirect_is_not_followed(ktrdr: Run, service: FakeService, status: int) -> None:
    service.answer(BUDGET_CALL, "", status)
    assert f"with status {status} is not from" in failed(ktrdr("agent", "budget"), 1)
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    "document",
    [
        {},
        {**STATUS, "today_spend": "a lot"},
        {**STATUS, "remaining": [1]},
        {**STATUS, "cycles_affordable": "many"},
        {**STATUS, "held": True},
        {**STATUS, "today_spend": float("nan")},
        {key: value for key, value in STATUS.items() if key != "remaining"},
    ],
    ids=range(7),
)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_json_reply_of_a_different_kind_of_service_is_an_error(
    ktrdr: Run, service: FakeService, document: object, options: tuple[str, ...]
) -> None:
    service.answer(BUDGET_CALL, document)
    assert "is not from a ktrdr-budget service" in failed(ktrdr("agent", "budget", *options), 1)


@pytest.mark.parametrize(
    ("raw", "exit_code", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", 1, "does not speak HTTP"),
        (b"HTTP/1.1 abc\r\n\r\n", 1, "does not speak HTTP"),
        (b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n", 1, "does not speak HTTP"),
        (b"", 4, "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{", 4, "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{", 4, "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{", 4, "closed the connection"),
    ],
    ids=range(7),
)
def test_an_incomplete_or_invalid_http_reply_is_an_error(
    ktrdr: Run, service: FakeService, raw: bytes, exit_code: int, message: str
) -> None:
    service.answer(BUDGET_CALL, raw)
    line = failed(ktrdr("agent", "budget"), exit_code)
    assert message in line
    assert service.url in line


def test_a_closed_port_is_reported_as_unreachable(ktrdr: Run) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        line = failed(ktrdr("--api-url", url, "budget", "reserve", "agent", "1"), 4)
    assert line == (
        f"ktrdr: cannot reach the service at {url}: Connection refused;"
        " start it with 'ktrdr serve', or set KTRDR_API_URL to its address"
    )


def test_an_unknown_host_is_reported_as_unreachable(ktrdr: Run) -> None:
    assert "cannot reach the service" in failed(ktrdr("--api-url", "http://no-such-host.invalid", "agent", "budget"), 4)


def test_an_https_url_of_a_service_without_tls_is_reported_as_unreachable(ktrdr: Run, service: FakeService) -> None:
    failed(ktrdr("--api-url", service.url.replace("http:", "https:"), "agent", "budget"), 4)


@pytest.fixture
def silent(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """A service that accepts requests and never replies, with a short timeout in the command."""
    monkeypatch.setattr(client, "TIMEOUT_S", 0.2)

    def wait(request: Request) -> bytes:
        service.stop.wait(30)
        return b""

    for call in (
        BUDGET_CALL,
        "POST /api/v1/reservations",
        "POST /api/v1/spend",
        "POST /api/v1/reservations/op_1/commit",
    ):
        service.answer(call, wait)
    return service


def test_a_service_that_does_not_reply_in_time_is_reported_as_unreachable(ktrdr: Run, silent: FakeService) -> None:
    assert failed(ktrdr("agent", "budget"), 4).endswith("within 0.2 s")


@pytest.mark.parametrize("words", [("reserve", "agent", "1"), ("record", "agent", "1")])
def test_the_error_names_the_id_for_a_safe_retry_if_no_reply_arrives(
    ktrdr: Run, silent: FakeService, words: tuple[str, ...]
) -> None:
    line = failed(ktrdr("budget", *words), 4)
    sent = wait_until(lambda: silent.requests)[-1].body["id"]
    assert line.endswith(f"; the request may have taken effect: repeating the request with --id {sent} is safe")


def test_the_error_says_that_a_retry_is_safe_if_no_reply_to_a_settlement_arrives(
    ktrdr: Run, silent: FakeService
) -> None:
    assert failed(ktrdr("budget", "commit", "op_1"), 4).endswith(
        "; the request may have taken effect: repeating the request is safe"
    )


def test_the_error_names_the_id_for_a_safe_retry_in_an_outage_of_the_store(ktrdr: Run, service: FakeService) -> None:
    service.answer("POST /api/v1/reservations", *reversed(problem(503, "Store unavailable", "the store is down")))
    line = failed(ktrdr("budget", "reserve", "agent", "1", "--id", "op_1"), 4)
    assert (
        line
        == "ktrdr: the store is down; the request may have taken effect: repeating the request with --id op_1 is safe"
    )


# --- Names and denials ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [("team:quant", "team%3Aquant"), ("a/b@c", "a%2Fb%40c"), ("..", ".."), ("A-Z_0.9", "A-Z_0.9")],
)
def test_budget_names_are_percent_encoded_in_request_paths(
    ktrdr: Run, service: FakeService, name: str, path: str
) -> None:
    service.answer(f"GET /api/v1/budgets/{path}", BUDGET)
    result = ktrdr("budget", "show", name)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "agent: budget_exhausted ($0.10 remaining, need $0.15); retry in 1 h"),
        (
            {"reason": "exceeds_limit", "retry_after": None, "requested": "6.00", "remaining": "5.00"},
            "agent: exceeds_limit ($5.00 remaining, need $6.00); a retry cannot succeed",
        ),
        (
            {"budget": "cycles", "reason": "budget_held", "remaining": 0, "requested": 1, "retry_after": 7},
            "cycles: budget_held (0 remaining, need 1); retry in 7 s",
        ),
        (
            {"budget": "cycles", "unit": "cycles", "remaining": 0, "requested": 1, "retry_after": 7},
            "cycles: budget_exhausted (0 cycles remaining, need 1 cycles); retry in 7 s",
        ),
        (
            {"retry_after": 63_124},
            "agent: budget_exhausted ($0.10 remaining, need $0.15); retry in 17 h 32 min",
        ),
        ({"remaining": "0.0000016"}, "agent: budget_exhausted ($0.0000016 remaining, need $0.15); retry in 1 h"),
    ],
)
def test_a_denial_is_reported_in_one_line(changes: dict[str, object], line: str) -> None:
    assert denial_line({**DENIAL, **changes}) == line


def test_a_malformed_denial_is_an_error(ktrdr: Run, service: FakeService) -> None:
    service.answer("POST /api/v1/reservations", {"reason": "budget_exhausted"}, 429)
    failed(ktrdr("budget", "reserve", "agent", "1"), 1)


def test_an_invalid_url_is_rejected_before_a_request_is_sent() -> None:
    with pytest.raises(InvalidInput, match="http://"):
        Service.at("unix:///tmp/s")
