"""Outcomes on spans: no text of a provider, a prompt or a reply leaves the process."""

from __future__ import annotations

from asyncio import CancelledError
from typing import Any

import pytest

from ktrdr_budget.agent.span_outcomes import set_outcome
from ktrdr_budget.errors import InvalidArgument


class ProviderError(Exception):
    """An error of a provider's SDK."""


ProviderError.__module__ = "anthropic._exceptions"


class Recorder:
    """A span that records what is set on it."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}
        self.recorded: list[tuple[BaseException, str | None]] = []
        self.failure: str | None = None

    def set_attribute(self, name: str, value: Any) -> None:
        self.attributes[name] = value

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        self.attributes |= attributes

    def record_exception(self, error: BaseException, message: str | None) -> None:
        self.recorded.append((error, message))

    def fail(self, text: str) -> None:
        self.failure = text


def outcome_of(error: BaseException | None, *, asked: bool = False) -> tuple[str, Recorder]:
    span: Any = Recorder()
    return set_outcome(span, error, asked=asked), span


def test_a_phase_without_an_error_has_the_outcome_completed():
    text, span = outcome_of(None)
    assert (text, span.attributes, span.failure) == ("", {"outcome": "completed"}, None)


def test_a_cancellation_is_recorded_as_an_outcome_and_not_as_an_error():
    text, span = outcome_of(CancelledError())
    assert (text, span.attributes["outcome"], span.failure, span.recorded) == ("", "cancelled", None, [])


def test_the_message_of_an_error_is_recorded_if_the_phase_made_no_model_call():
    error = ValueError("no data for 2026")
    text, span = outcome_of(error)
    assert text == span.failure == "ValueError: no data for 2026"
    assert span.recorded == [(error, None)]


def test_the_message_of_an_error_from_outside_this_package_is_not_recorded_after_a_model_call():
    error = ValueError("the reply was: secret")
    text, span = outcome_of(error, asked=True)
    assert text == span.failure == "ValueError"
    assert span.recorded == [(error, "")]


def test_the_message_of_an_error_of_this_package_is_recorded_after_a_model_call():
    text, _ = outcome_of(InvalidArgument("unknown strategy"), asked=True)
    assert text == "InvalidArgument: unknown strategy"


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_the_message_of_an_error_caused_by_a_provider_error_is_not_recorded(link):
    middle, error = RuntimeError("secret"), RuntimeError("secret")
    setattr(middle, link, ProviderError("secret"))
    setattr(error, link, middle)
    assert outcome_of(error)[0] == "RuntimeError"
    assert outcome_of(ProviderError("secret"))[0] == "ProviderError"


def test_the_search_for_causes_ends_if_two_errors_cause_each_other():
    first, second = RuntimeError("one"), RuntimeError("two")
    first.__context__, second.__cause__ = second, first
    assert outcome_of(first)[0] == "RuntimeError: one"
