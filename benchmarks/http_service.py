"""The service: reservations over HTTP, beside an empty route of the same app."""

from __future__ import annotations

import statistics

from benchmarks.http_load import requests_per_second
from benchmarks.measures import Measure, Settings, at_least
from benchmarks.servers import running
from benchmarks.service_process import service

__all__ = ["http_service"]

_CONNECTIONS = 64
_BODY = '{"amounts":{"agent":"0.0015"}}'


async def http_service(settings: Settings) -> list[Measure]:
    """``POST /reservations`` over 64 connections, as a share of the throughput of an empty FastAPI route."""
    seconds = 0.5 if settings.quick else 2.0
    reserved, empty = [], []
    with running(settings.store) as server, service(server.url) as port:
        for number in range(settings.rounds(7) + 1):
            theirs = requests_per_second(port, "/empty", _CONNECTIONS, seconds)
            own = requests_per_second(port, "/api/v1/reservations", _CONNECTIONS, seconds, _BODY)
            if number:
                empty.append(theirs)
                reserved.append(own)
    ratios = tuple(own / theirs for own, theirs in zip(reserved, empty, strict=True))
    detail = f"{statistics.median(reserved):,.0f} requests/s; empty {statistics.median(empty):,.0f}/s"
    title = f"POST /reservations, {_CONNECTIONS} connections, to an empty FastAPI route"
    return [Measure("http_reservations_to_empty_route", title, "x", ratios, at_least(0.45), detail=detail)]
