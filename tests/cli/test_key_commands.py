"""``ktrdr key create | list | revoke``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from .support import FakeService, problem

Run = Callable[..., Result]
SECRET = "ktrdr_" + "A" * 43
CI: dict[str, Any] = {
    "name": "ci",
    "scope": {"app": "web", "team": "quant"},
    "may_set": ["model", "user"],
    "rights": "use",
    "created_at": "2026-11-23T12:00:00Z",
    "expires_at": "2027-02-21T12:00:00Z",
}
PLAIN: dict[str, Any] = {**CI, "name": "ops", "scope": {}, "may_set": [], "rights": "admin", "expires_at": None}


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ((), {}),
        (("--scope", "team=quant", "--scope", "app=a=b"), {"scope": {"team": "quant", "app": "a=b"}}),
        (("--may-set", "user, model"), {"may_set": ["user", "model"]}),
        (("--rights", "admin"), {"rights": "admin"}),
        (("--expires", "90d", "--reason", "the nightly build"), {"expires": "90d", "reason": "the nightly build"}),
    ],
)
def test_the_create_command_sends_the_fields_of_the_key(
    ktrdr: Run, service: FakeService, words: tuple[str, ...], fields: dict[str, Any]
) -> None:
    service.answer("POST /api/v1/keys", {**CI, "secret": SECRET}, 201)
    result = ktrdr("key", "create", "ci", *words)
    assert result.exit_code == 0, result.stderr
    assert service.requests[0].body == {"name": "ci", "scope": {}, "may_set": [], "rights": "use", **fields}


def test_the_create_command_prints_the_secret(ktrdr: Run, service: FakeService) -> None:
    service.answer("POST /api/v1/keys", {**CI, "secret": SECRET}, 201)
    assert ktrdr("key", "create", "ci").stdout == (
        "Key:         ci\n"
        "Rights:      use\n"
        "Scope:       app=web, team=quant\n"
        "May set:     model, user\n"
        "Expires at:  2027-02-21T12:00:00Z\n"
        f"Secret:      {SECRET}\n"
        "The secret is not shown again.\n"
    )
    service.answer("POST /api/v1/keys", {**PLAIN, "secret": SECRET}, 201)
    assert ktrdr("key", "create", "ops").stdout.splitlines()[:4] == [
        "Key:         ops",
        "Rights:      admin",
        "Scope:       none",
        "Expires at:  never",
    ]
    assert json.loads(ktrdr("key", "create", "ops", "--json").stdout) == {**PLAIN, "secret": SECRET}


@pytest.mark.parametrize(
    "words",
    [("a b",), ("ci", "--scope", "team"), ("ci", "--scope", "a=1", "--scope", "a=2"), ("ci", "--rights", "root"), ()],
)
def test_invalid_arguments_of_the_create_command_are_refused_before_a_request_is_sent(
    ktrdr: Run, service: FakeService, words: tuple[str, ...]
) -> None:
    result = ktrdr("key", "create", *words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert service.requests == []


def test_a_conflict_is_an_error_and_a_lost_reply_advises_to_revoke_the_key(ktrdr: Run, service: FakeService) -> None:
    detail = "a key named 'ci' exists: revoke it first, or use another name"
    service.answer("POST /api/v1/keys", *reversed(problem(409, "The key cannot be created", detail)))
    result = ktrdr("key", "create", "ci")
    assert (result.exit_code, result.stderr) == (1, f"ktrdr: {detail}\n")
    service.answer("POST /api/v1/keys", *reversed(problem(503, "The store cannot be reached", "no reply")))
    result = ktrdr("key", "create", "ci")
    advice = "before you repeat the command, revoke the key: ktrdr key revoke ci"
    assert (result.exit_code, result.stderr) == (4, f"ktrdr: no reply; {advice}\n")


def test_the_list_command_prints_a_table_without_secrets(ktrdr: Run, service: FakeService) -> None:
    service.answer("GET /api/v1/keys", {"keys": [CI, PLAIN], "next_cursor": None})
    assert ktrdr("key", "list").stdout == (
        "NAME  RIGHTS  SCOPE                MAY SET      CREATED AT            EXPIRES AT\n"
        "ci    use     app=web, team=quant  model, user  2026-11-23T12:00:00Z  2027-02-21T12:00:00Z\n"
        "ops   admin                                     2026-11-23T12:00:00Z  never\n"
    )
    service.answer("GET /api/v1/keys", {"keys": [], "next_cursor": None})
    assert ktrdr("key", "list").stdout == "No keys.\n"


def test_the_revoke_command_revokes_a_key_by_its_name(ktrdr: Run, service: FakeService) -> None:
    revoked = {"name": "team/ci", "revoked": True}
    service.answer("DELETE /api/v1/keys/team%2Fci", revoked)
    assert ktrdr("key", "revoke", "team/ci").stdout == "Revoked team/ci\n"
    service.answer("DELETE /api/v1/keys/team%2Fci?reason=it+leaked", revoked)
    assert json.loads(ktrdr("key", "revoke", "team/ci", "--reason", "it leaked", "--json").stdout) == revoked
    result = ktrdr("key", "revoke", "unknown")
    assert result.exit_code == 1
