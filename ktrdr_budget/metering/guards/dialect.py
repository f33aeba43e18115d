"""What a guard must know of a provider: which requests spend, what they may cost, and how answers tell the usage."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

from ktrdr_budget.metering.guards.bounds import Bound, GuardOptions, text_bytes
from ktrdr_budget.metering.usage import Usage

__all__ = ["Dialect", "Ear", "Listener", "Route", "count_of"]

logger = logging.getLogger("ktrdr_budget")

Route = Literal["free", "refused"] | str
"""``free``, ``refused``, or the name of the endpoint that is metered."""

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_TELLS = re.compile(
    rb'"(?:usage"\s*:\s*\{|finish_reason"\s*:\s*"|error"\s*[:,}]|message_stop"|response\.(?:completed|incomplete|failed)")'
    rb"|^data: ?\[DONE\]",
    re.MULTILINE,
)
"""An event that may carry the usage, the end, or an error. Within a text these quotes would be escaped."""
_DONE = b"[DONE]"
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}$")


class Dialect(Protocol):
    """One provider."""

    def route(self, method: str, path: str) -> Route:
        """What is to be done with a request."""
        ...

    def model(self, path: str, body: dict[str, Any]) -> str:
        """The model whose price counts."""
        ...

    def bound(self, route: Route, model: str, body: dict[str, Any], size: int, options: GuardOptions) -> Bound:
        """What a request can use at most; ``size``: the bytes of its text.

        Raises:
            UnmeteredCall: that cannot be told.
        """
        ...

    def ear(self, route: Route, bound: Bound) -> Ear:
        """What listens to the answer."""
        ...


class Ear:
    """Reads the usage in an answer's JSON. One for each attempt of a call.

    Within a stream the maximum of each field counts: an event that says less, or nothing, takes nothing back.
    """

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.usage: Usage | None = None
        """What was reported so far; ``None`` unless it is credible: both counts present, and an input above 0."""
        self.final = False
        """The usage was reported after the model had finished."""
        self.ended = False
        """The provider has ended its answer: no further usage will come."""
        self.ending = False
        """The model has finished; unless the usage was reported already, it is about to come."""
        self.failure = ""
        """The kind of error that a stream reported, as the provider calls it; empty if it reported none."""
        self._counts: dict[str, Any] = {}

    def document(self, answer: dict[str, Any]) -> None:
        """A whole answer."""
        raise NotImplementedError

    def event(self, event: dict[str, Any]) -> None:
        """One event of a stream."""
        raise NotImplementedError

    def pass_by(self, data: bytes) -> None:
        """Events that report nothing, of which the answer is made."""

    def end(self) -> None:
        """The answer has ended."""
        self.ended = True

    def is_usage_only(self, event: dict[str, Any]) -> bool:
        """Whether an event carries the usage and nothing else."""
        return False

    def learn(self, reported: object) -> bool:
        """Merge a usage object into what is known; return whether it was one with anything in it."""
        if not isinstance(reported, dict) or not reported:
            return False
        merge_counts(self._counts, reported)
        self.usage = self.read(self._counts)
        return True

    def read(self, counts: dict[str, Any]) -> Usage | None:
        """The usage in the provider's fields, if it is credible."""
        raise NotImplementedError

    def credible(self, input_tokens: int, output_tokens: int | None) -> bool:
        """Whether these counts can be what a call has used: every request has input, and says how much it put out.

        Args:
            input_tokens: all input, what came from a cache included.
            output_tokens: ``None`` if it was not reported, which is enough where output is not counted (embeddings).
        """
        return input_tokens > 0 and (output_tokens is not None or self.bound.output_tokens_max == 0)


def merge_counts(known: dict[str, Any], reported: dict[str, Any]) -> None:
    """Merge a provider's usage object into an earlier one: the maximum of each count, the last of each text."""
    for name, value in reported.items():
        if isinstance(value, dict):
            inner = known.setdefault(name, {})
            if isinstance(inner, dict):
                merge_counts(inner, value)
        elif isinstance(value, str):
            known[name] = value
        elif (count := count_of(value)) is not None:
            known[name] = max(count, count_of(known.get(name)) or 0)


def count_of(value: object) -> int | None:
    """A count of tokens as JSON carries it; ``None`` if it is none, such as null, a text, or a negative number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and value >= 0 else None


class Listener:
    """Listens to the bytes of an answer as they pass by.

    Args:
        events: it is a stream of server-sent events, and not one JSON document.
        unseen_output_tokens: what a provider may have made beyond what arrived, if a stream breaks off.
    """

    def __init__(self, ear: Ear, *, events: bool, unseen_output_tokens: int) -> None:
        self._ear = ear
        self._events = events
        self._unseen = unseen_output_tokens
        self._buffer = b""
        self._passed: list[bytes] = []
        """Whole events, one or more in each: read again only if an estimate is needed."""
        self.deaf = False
        """The answer is encoded in a way that cannot be read."""
        self.told = 0
        """How often something was told that may be the usage."""

    @property
    def usage(self) -> Usage | None:
        """See :attr:`Ear.usage`."""
        return self._ear.usage

    @property
    def final(self) -> bool:
        """Whether that is the provider's last word."""
        return self._ear.usage is not None and self._ear.final

    @property
    def ended(self) -> bool:
        """Whether the provider has ended its answer, and without an error: nothing more can be reported."""
        return self._ear.ended and not self._ear.failure

    @property
    def ending(self) -> bool:
        """The usage is about to come."""
        ear = self._ear
        return ear.ending and not ear.ended and not self.final and ear.bound.reports_usage

    def hear(self, data: bytes) -> bytes:
        """Take what arrived; return what the caller is to see."""
        if self.deaf:
            return data
        if not self._events:
            self._buffer += data
            return data
        if not self._buffer and data.endswith(b"\n\n") and not _TELLS.search(data):
            self._pass_by(data)  # as most of a stream
            return data
        hides = self._ear.bound.hide_usage
        shown = b"" if hides else data
        for event in self._split(data):
            told = self._event(event)
            if hides and (told is None or not self._ear.is_usage_only(told)):
                shown += event
        return shown

    def end(self) -> bytes:
        """All has arrived; return what the caller is still to see."""
        rest, self._buffer = self._buffer, b""
        if self._events and not self.deaf:
            self._event(rest)
        elif not self.deaf and (answer := _parsed(rest)) is not None:
            self._tell(self._ear.document, answer)
        self._ear.end()
        return rest if self._events and not self.deaf and self._ear.bound.hide_usage else b""

    @property
    def failure(self) -> str:
        """See :attr:`Ear.failure`."""
        return self._ear.failure

    def estimate(self, all_heard: bool = True) -> Usage:
        """What an answer that broke off has used at most, as far as that can be told; no input if none was told.

        Args:
            all_heard: nothing had arrived besides what was heard. Else the output may have been as long as it may be.
        """
        bound, known = self._ear.bound, self._ear.usage or Usage()
        most = bound.output_tokens_max
        if all_heard and self._events and not self.deaf and not bound.hidden_output:
            events = (event for passed in self._passed for event in _EVENT_END.split(passed))
            seen_bytes = sum(_delta_bytes(told) for told in map(_data, events) if told is not None)
            most = min(most, seen_bytes + self._unseen * bound.choices)
        return Usage(
            known.input_tokens,
            max(known.output_tokens, most),
            known.cache_read_tokens,
            known.cache_write_tokens,
            known.cache_write_1h_tokens,
            known.service_tier,
            known.other,
        )

    def _split(self, data: bytes) -> Iterator[bytes]:
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

    def _pass_by(self, data: bytes) -> None:
        self._passed.append(data)
        self._ear.pass_by(data)

    def _event(self, event: bytes) -> dict[str, Any] | None:
        if not _TELLS.search(event):
            self._pass_by(event)
            return None
        self._passed.append(event)
        data = _payload(event)
        told = _parsed(data)
        if data.strip() == _DONE:
            self._ear.end()
        if told is not None:
            self._tell(self._ear.event, told)
            self._ear.failure = self._ear.failure or _failure(told)
        return told

    def _tell(self, ear: Callable[[dict[str, Any]], None], told: dict[str, Any]) -> None:
        self.told += 1
        try:
            ear(told)
        except Exception:
            # The answer is the caller's, however odd; what it does not report is estimated.
            logger.warning("a provider reported its usage in an unknown way")


def _payload(event: bytes) -> bytes:
    return b"\n".join([line[5:] for line in event.splitlines() if line.startswith(b"data:")])


def _data(event: bytes) -> dict[str, Any] | None:
    return _parsed(_payload(event))


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data) if data else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _failure(event: dict[str, Any]) -> str:
    """The kind of error that an event tells, in the shapes of all providers."""
    told = event.get("error")
    if event.get("type") == "response.failed":
        told = (event.get("response") or {}).get("error") or {}
    elif event.get("type") == "error" and not isinstance(told, dict):
        told = event
    if not isinstance(told, dict):
        return ""
    kinds = (told.get("code"), told.get("type"))
    return next((kind for kind in kinds if isinstance(kind, str) and _WORD.match(kind)), "error")


def _delta_bytes(event: dict[str, Any]) -> int:
    """Bytes of what the model made, in one event."""
    choices = event.get("choices")
    if isinstance(choices, list):
        return text_bytes([choice.get("delta") or choice.get("text") for choice in choices if isinstance(choice, dict)])
    begun = event.get("item") if event.get("type") == "response.output_item.added" else event.get("content_block")
    return text_bytes(event.get("delta")) + text_bytes(begun)
