"""Failures are translated by the class of an exception, or by the code of an error reply."""

from __future__ import annotations

import pytest
from redis import exceptions as redis

from ktrdr_budget.engine.transport.connection import ReplyError
from ktrdr_budget.engine.transport.errors import NoScript, Transient, translate, unavailable, without_secrets
from ktrdr_budget.engine.transport.protocol_check import WrongProtocol
from ktrdr_budget.errors import StoreError


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (redis.AuthenticationError("invalid username-password pair or user is disabled."), "login"),
        (ReplyError("NOAUTH Authentication required."), "login"),
        (ReplyError("WRONGPASS invalid username-password pair or user is disabled."), "login"),
        (redis.AuthenticationError("credential_provider must return a password"), "login"),
        (WrongProtocol("the server at a:1 does not speak TLS"), "protocol"),
        (redis.InvalidResponse("Protocol Error: b'HTTP/1.1 400 Bad Request'"), "protocol"),
        (ReplyError("OOM command not allowed when used memory > 'maxmemory'."), ""),
        (redis.ResponseError("the login was WRONGPASS in an earlier message"), ""),
    ],
)
def test_an_error_reply_becomes_a_store_error_with_the_matching_fault(error, fault):
    translated = translate(error, "redis://store")
    assert isinstance(translated, StoreError)
    assert translated.fault == fault
    assert str(translated).startswith("store at redis://store: ")
    assert not translated.ambiguous


@pytest.mark.parametrize(
    ("error", "sent", "answered"),
    [
        (ConnectionResetError("the connection was closed"), True, False),
        (redis.ConnectionError("Connection closed by server."), True, False),
        (redis.ConnectionError("Error 111 connecting to store:6379. Connection refused."), False, False),
        (ReplyError("LOADING Redis is loading the dataset in memory"), False, True),
        (ReplyError("READONLY You can't write against a read only replica."), False, True),
        (redis.ReadOnlyError("You can't write against a read only replica."), False, True),
        (redis.ClusterDownError("The cluster is down"), False, True),
    ],
)
def test_a_temporary_failure_of_the_store_is_classified_as_transient(error, sent, answered):
    translated = translate(error, "redis://store")
    assert isinstance(translated, Transient)
    assert (translated.sent, translated.answered) == (sent, answered)
    final = unavailable(translated, "redis://store", 0.5, ambiguous=sent)
    assert (final.ambiguous, final.reached) == (sent, answered)
    assert str(final).endswith("; gave up after 0.5 s")


def test_a_missing_script_has_its_own_error_class_and_an_unrelated_error_stays_unchanged():
    assert isinstance(translate(ReplyError("NOSCRIPT No matching script."), ""), NoScript)
    assert isinstance(translate(redis.NoScriptError("No matching script."), ""), NoScript)
    unrelated = KeyError("x")
    assert translate(unrelated, "") is unrelated


def test_an_error_message_shows_neither_the_login_of_a_url_nor_a_location_in_a_script():
    error = ReplyError("broken redis://me:secret@store:6379 script: f00, on @user_script:12.\nsecond line")
    assert without_secrets(error) == "broken redis://***@store:6379"
