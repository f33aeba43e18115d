"""The bytes of a response reach the SDK unchanged; usage, the end and errors are parsed from the bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ktrdr_budget.metering.guards.bounds import Bound
from ktrdr_budget.metering.guards.response_parser import ResponseParser
from ktrdr_budget.metering.guards.usage_parser import UsageParser
from ktrdr_budget.metering.usage import Usage

END = {"usage": {"in": 9, "out": 3}, "done": True}


class Format(UsageParser):
    """A response format: ``usage`` has the two counts, ``done`` ends the model's output."""

    def parse_document(self, document: dict[str, Any]) -> None:
        self.final = self.merge(document.get("usage"))

    def parse_event(self, event: dict[str, Any]) -> None:
        self.model_finished = "done" in event or "finish_reason" in event
        self.final = self.merge(event.get("usage")) and self.model_finished

    def is_usage_only(self, event: dict[str, Any]) -> bool:
        return "usage" in event

    def usage_of(self, counts: dict[str, Any]) -> Usage:
        return Usage(counts["in"], counts["out"])


def parser(*, events: bool = True, **bound: Any) -> ResponseParser:
    return ResponseParser(Format(Bound("m", 1000, 50, **bound)), events=events, unseen_output_tokens=5)


def event(document: object) -> bytes:
    return b"data: " + (document if isinstance(document, bytes) else json.dumps(document).encode()) + b"\n\n"


def delta(text: str) -> bytes:
    return event({"choices": [{"delta": {"content": text}}]})


def test_a_document_is_parsed_after_the_last_byte_has_arrived() -> None:
    made, body = parser(events=False), json.dumps(END).encode()
    assert made.feed(body[:7]) + made.feed(body[7:]) == body
    assert made.usage is None
    assert made.end() == b""
    assert (made.usage, made.final, made.ended) == (Usage(9, 3), True, True)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_stream_events_with_any_line_ending_are_parsed_even_if_split_at_any_byte(line_end: str, size: int) -> None:
    data = (delta("a") + event({"usage": {"in": 9, "out": 1}}) + event(END) + event(b"[DONE]")).decode()
    data = data.replace("\n", line_end).encode()
    made = parser()
    assert b"".join(made.feed(data[at : at + size]) for at in range(0, len(data), size)) + made.end() == data
    assert (made.usage, made.final, made.ended, made.reports) == (Usage(9, 3), True, True, 2)


def test_a_stream_ends_at_the_done_event_before_the_connection_closes() -> None:
    made = parser()
    made.feed(delta("[DONE]") + event(END))
    assert not made.ended
    made.feed(event(b"[DONE]"))
    assert made.ended


def test_output_text_that_looks_like_a_usage_report_is_not_parsed_as_usage() -> None:
    made = parser()
    made.feed(delta('"usage": {"in": 1, "out": 1}'))
    assert (made.usage, made.reports) == (None, 0)


def test_the_usage_event_is_hidden_if_the_caller_did_not_request_usage() -> None:
    made = parser(hide_usage=True)
    assert made.feed(delta("a") + event(END) + event(b"[DONE]")[:-1]) + made.end() == delta("a") + event(b"[DONE]")[:-1]
    assert made.usage == Usage(9, 3)


@pytest.mark.parametrize(
    ("error", "error_type"),
    [
        ({"error": {"type": "overloaded_error"}}, "overloaded_error"),
        ({"error": {"type": "server_error", "code": "rate_limit"}}, "rate_limit"),
        ({"type": "error", "code": "bad_request"}, "bad_request"),
        ({"type": "response.failed", "response": {"error": {"code": "server_error"}}}, "server_error"),
        ({"error": {"message": "secret", "type": "no type: a sentence"}}, "error"),
        ({"error": None, "usage": {"in": 1, "out": 1}}, ""),
    ],
)
def test_the_error_type_of_a_stream_is_the_type_sent_by_the_provider(error: dict[str, Any], error_type: str) -> None:
    made = parser()
    made.feed(event(error))
    made.end()
    assert made.error_type == error_type
    assert made.ended == (not error_type), "a stream with an error did not end as the provider intended"


def test_the_parser_awaits_a_usage_report_after_the_finish_reason() -> None:
    made, silent = parser(), parser(reports_usage=False)
    finished = event({"finish_reason": "stop"})
    assert not made.awaits_usage
    made.feed(finished)
    silent.feed(finished)
    assert made.awaits_usage and not silent.awaits_usage
    made.feed(event(END))
    assert not made.awaits_usage


def test_an_invalid_usage_report_is_passed_on_to_the_caller_and_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    made, report = parser(), event({"usage": {"in": "much"}})
    assert made.feed(report) == report
    assert made.usage is None
    assert "usage report not understood" in caplog.text


def test_the_estimate_of_a_broken_stream_counts_output_bytes_plus_an_allowance_per_answer() -> None:
    made = parser(choices=2)
    made.feed(delta("abc") + delta("€"))
    assert made.estimate().output_tokens == 3 + 3 + 2 * 5
    made.feed(event({"usage": {"in": 9, "out": 30}}))
    assert made.estimate() == Usage(9, 30), "a reported count is a lower bound"


@pytest.mark.parametrize(
    ("made", "all_parsed"), [(parser(), False), (parser(hidden_output=True), True), (parser(events=False), True)]
)
def test_the_estimate_is_the_output_limit_if_part_of_the_output_was_not_visible(
    made: ResponseParser, all_parsed: bool
) -> None:
    made.feed(delta("abc"))
    assert made.estimate(all_parsed).output_tokens == 50


def test_the_estimate_of_an_unreadable_response_is_the_output_limit() -> None:
    made = parser(hide_usage=True)
    made.unreadable = True
    assert made.feed(event(END)) == event(END)
    assert made.end() == b""
    assert made.estimate() == Usage(0, 50)
