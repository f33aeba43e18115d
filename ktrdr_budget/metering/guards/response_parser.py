"""Parse the bytes of a response while they pass through to the SDK: one JSON document, or server-sent events."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ktrdr_budget.metering.guards.bounds import text_bytes
from ktrdr_budget.metering.guards.usage_parser import UsageParser
from ktrdr_budget.metering.usage import Usage

__all__ = ["ResponseParser"]

logger = logging.getLogger("ktrdr_budget")

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_REPORT = re.compile(
    rb'"(?:usage"\s*:\s*\{|finish_reason"\s*:\s*"|error"\s*[:,}]|message_stop"|response\.(?:completed|incomplete|failed)")'
    rb"|^data: ?\[DONE\]",
    re.MULTILINE,
)
"""Matches events that may report usage, the end of the response, or an error. The model's output does not match: JSON
escapes the quotes in it."""
_DONE = b"[DONE]"
_ERROR_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}$")


class ResponseParser:
    """Feeds a :class:`UsageParser` from the bytes of one response.

    Args:
        events: whether the response is a stream of server-sent events; if not, it is one JSON document.
        unseen_output_tokens: tokens estimated for output that was produced but not received when a stream broke off.
    """

    def __init__(self, usage_parser: UsageParser, *, events: bool, unseen_output_tokens: int) -> None:
        self._parser = usage_parser
        self._events = events
        self._unseen_output_tokens = unseen_output_tokens
        self._buffer = b""
        self._seen: list[bytes] = []
        """Chunks of one or more whole events, parsed again only if an estimate is needed."""
        self.unreadable = False
        """Whether the response has an encoding that this parser cannot read."""
        self.reports = 0
        """Number of events and documents that may have reported usage."""

    @property
    def usage(self) -> Usage | None:
        """See :attr:`UsageParser.usage`."""
        return self._parser.usage

    @property
    def final(self) -> bool:
        """Whether :attr:`usage` is the provider's final usage."""
        return self._parser.usage is not None and self._parser.final

    @property
    def ended(self) -> bool:
        """Whether the provider has ended the response without an error, so that no further usage can follow."""
        return self._parser.ended and not self._parser.error_type

    @property
    def awaits_usage(self) -> bool:
        """Whether the model has finished, and the usage report is expected next."""
        parser = self._parser
        return parser.model_finished and not parser.ended and not self.final and parser.bound.reports_usage

    @property
    def error_type(self) -> str:
        """See :attr:`UsageParser.error_type`."""
        return self._parser.error_type

    def feed(self, data: bytes) -> bytes:
        """Parse data that has arrived; return the data to pass on to the caller."""
        if self.unreadable:
            return data
        if not self._events:
            self._buffer += data
            return data
        if not self._buffer and data.endswith(b"\n\n") and not _REPORT.search(data):
            self._skip(data)  # the common case: whole events with output only
            return data
        hide_usage = self._parser.bound.hide_usage
        passed_on = b"" if hide_usage else data
        for event in self._split(data):
            report = self._feed_event(event)
            if hide_usage and (report is None or not self._parser.is_usage_only(report)):
                passed_on += event
        return passed_on

    def end(self) -> bytes:
        """Parse the buffered rest of the response; return the data that must still be passed on to the caller."""
        rest, self._buffer = self._buffer, b""
        if self._events and not self.unreadable:
            self._feed_event(rest)
        elif not self.unreadable and (document := _parse_object(rest)) is not None:
            self._parse(self._parser.parse_document, document)
        self._parser.end()
        return rest if self._events and not self.unreadable and self._parser.bound.hide_usage else b""

    def estimate(self, all_parsed: bool = True) -> Usage:
        """Return an upper bound of the usage of a response that broke off.

        The input is the reported input, or 0 if none was reported.

        Args:
            all_parsed: whether all data that had arrived was parsed. If not, the upper bound of the output is used.
        """
        bound, known = self._parser.bound, self._parser.usage or Usage()
        output_max = bound.output_tokens_max
        if all_parsed and self._events and not self.unreadable and not bound.hidden_output:
            output_max = min(output_max, self._seen_output_bytes() + self._unseen_output_tokens * bound.choices)
        return replace(known, output_tokens=max(known.output_tokens, output_max))

    def _seen_output_bytes(self) -> int:
        """Bytes of the output so far, which are an upper bound of its tokens."""
        events = (event for seen in self._seen for event in _EVENT_END.split(seen))
        parsed = (_parse_object(_payload(event)) for event in events)
        return sum(_delta_bytes(event) for event in parsed if event is not None)

    def _split(self, data: bytes) -> Iterator[bytes]:
        """Split off the complete events, and buffer the rest."""
        buffer = self._buffer + data
        begin = 0
        if b"\r" in buffer:
            for found in _EVENT_END.finditer(buffer):
                yield buffer[begin : found.end()]
                begin = found.end()
        else:
            while (end := buffer.find(b"\n\n", begin)) >= 0:
                yield buffer[begin : end + 2]
                begin = end + 2
        self._buffer = buffer[begin:]

    def _skip(self, data: bytes) -> None:
        self._seen.append(data)
        self._parser.skip(data)

    def _feed_event(self, event: bytes) -> dict[str, Any] | None:
        """Parse one event. Return the decoded event if it may report usage, the end or an error; else ``None``."""
        if not _REPORT.search(event):
            self._skip(event)
            return None
        self._seen.append(event)
        payload = _payload(event)
        report = _parse_object(payload)
        if payload.strip() == _DONE:
            self._parser.end()
        if report is not None:
            self._parse(self._parser.parse_event, report)
            self._parser.error_type = self._parser.error_type or _error_type(report)
        return report

    def _parse(self, parse: Callable[[dict[str, Any]], None], report: dict[str, Any]) -> None:
        self.reports += 1
        try:
            parse(report)
        except Exception:
            # The caller receives the response in any case; missing usage is estimated.
            logger.warning("usage report not understood; estimating the usage")


def _payload(event: bytes) -> bytes:
    return b"\n".join([line[5:] for line in event.splitlines() if line.startswith(b"data:")])


def _parse_object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data) if data else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _error_type(event: dict[str, Any]) -> str:
    """The type of an error in an event, in the formats of all providers; empty without an error."""
    error = event.get("error")
    if event.get("type") == "response.failed":
        error = (event.get("response") or {}).get("error") or {}
    elif event.get("type") == "error" and not isinstance(error, dict):
        error = event
    if not isinstance(error, dict):
        return ""
    names = (error.get("code"), error.get("type"))
    return next((name for name in names if isinstance(name, str) and _ERROR_TYPE.match(name)), "error")


def _delta_bytes(event: dict[str, Any]) -> int:
    """Bytes of the model's output in one event."""
    choices = event.get("choices")
    if isinstance(choices, list):
        return text_bytes([choice.get("delta") or choice.get("text") for choice in choices if isinstance(choice, dict)])
    block = event.get("item") if event.get("type") == "response.output_item.added" else event.get("content_block")
    return text_bytes(event.get("delta")) + text_bytes(block)
