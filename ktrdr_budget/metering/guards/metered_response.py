"""The response of one attempt. The response is parsed as it arrives, its usage is accrued, and its call is settled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ktrdr_budget.metering.dual_flow import DualFlow
from ktrdr_budget.metering.guards.network_tap import Drain
from ktrdr_budget.metering.guards.response_parser import ResponseParser
from ktrdr_budget.metering.metered_call import MeteredCall

__all__ = ["MeteredResponse", "ProviderStreamError"]

USAGE_TIMEOUT_S = 1.0
"""If the caller closes a stream after the last output, the guard waits this long for the usage report."""


class ProviderStreamError(Exception):
    """An error that the provider reported within a stream. Only the type of the error is kept."""

    def __init__(self, error_type: str) -> None:
        super().__init__(error_type)
        self.error_type = error_type


class MeteredResponse:
    """A response and the metered call that pays for it."""

    def __init__(self, call: MeteredCall, parser: ResponseParser) -> None:
        self.call: MeteredCall | None = call
        """The metered call; ``None`` once the response is settled."""
        self.parser = parser
        self.tap: Any = None
        """The network tap of the connection; ``None`` if the connection cannot be tapped."""

    def feed(self, data: bytes) -> bytes:
        """Parse data, and accrue the usage that it reports; return the data to pass on to the caller."""
        parser = self.parser
        if self.tap is not None:
            self.tap.mark_parsed(data)
        reports = parser.reports
        passed_on = parser.feed(data)
        if parser.reports != reports and self.call is not None and not parser.final and parser.usage is not None:
            self.call.report(parser.usage)
        return passed_on

    def settle(self, error: BaseException | None, all_parsed: bool) -> DualFlow[None]:
        """Commit the final usage, or an estimate. If the response is settled already, this has no effect.

        Args:
            error: the error that ended the response; ``None`` without one.
            all_parsed: whether all data that had arrived was parsed.
        """
        call = self.take_call(all_parsed)
        if call is not None:
            error_type = self.parser.error_type
            yield from call.leave_flow(ProviderStreamError(error_type) if error_type and error is None else error)

    def take_call(self, all_parsed: bool) -> MeteredCall | None:
        """Report the final usage, or an estimate, to the metered call; return that call.

        If the response is settled already, return ``None``.
        """
        call, self.call = self.call, None
        if call is not None:
            usage = self.parser.usage
            if self.parser.final and usage is not None:
                call.finish(usage)
            elif self.parser.ended:
                call.unreported()
            else:
                call.report(self.parser.estimate(all_parsed))
        return call

    @property
    def all_parsed(self) -> bool:
        """Whether all data that has arrived is parsed; false if that is unknown."""
        return self.tap is not None and bool(self.tap.all_parsed)

    @property
    def lost_no_data(self) -> bool:
        """Whether all data that had arrived before a failed read was received; false if the read lost data."""
        return self.tap is None or not self.tap.data_lost

    def is_deferred(self, error: BaseException) -> bool:
        """Whether the tap deferred this error, because data arrived together with the error."""
        return self.tap is not None and self.tap.deferred_error is error

    @property
    def awaits_usage(self) -> bool:
        """Whether the model has finished, and the usage report is expected next."""
        return self.call is not None and self.parser.awaits_usage

    @contextmanager
    def draining(self) -> Iterator[Drain]:
        """Within the block, reads return only data that has arrived. The yielded :class:`Drain` limits these reads."""
        drain = Drain(USAGE_TIMEOUT_S, USAGE_TIMEOUT_S) if self.awaits_usage else Drain()
        if self.tap is not None:
            self.tap.expects_data, self.tap.drain = self.awaits_usage, drain
        try:
            yield drain
        finally:
            if self.tap is not None:
                self.tap.drain = None

    def needs_more(self, drain: Drain) -> bool:
        """Whether to continue a drain: no final usage was reported, and no limit of the drain is reached."""
        parser = self.parser
        return self.call is not None and not parser.final and not parser.ended and not drain.exhausted

    def detach(self) -> None:
        """Remove the tap from the connection."""
        if self.tap is not None:
            self.tap.detach()
