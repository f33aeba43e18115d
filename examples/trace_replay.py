"""Replay an hour of real traffic against a lower cap, in four processes: ``python -m examples.trace_replay``.

The trace (``data/README.md``) has the time, the prompt length and the answer length of each request. Each request is
priced as a call of a real model, reserved at its worst case, and committed at its cost; the hour takes half a minute.
The run checks that spend never exceeds the cap, and that admitted requests are billed exactly. It prints a summary, and
draws a picture of the hour.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import multiprocessing
import secrets
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetExceeded, Meter, Prices, Usage

TRACE = Path(__file__).with_name("data") / "azure_llm_2023_code.csv"
PROVIDER = "anthropic"
OUTPUT_TOKENS_MAX = 2048
"""The output limit of each request; the longest answer of the trace has 1,899 tokens."""
TOKENS_PER_S = 60
"""The speed of the model, which determines the duration of a request."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the trace."""

    at_s: float
    """Seconds since the first request."""
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Replay:
    """The parameters of a run, passed to every process."""

    url: str | None
    data_dir: str
    tenant: str
    limit: str
    model: str
    begins_at: float
    """The begin of the hour, in seconds since the epoch."""
    speedup: float

    def limiter(self) -> AsyncBudgetLimiter:
        """Create the limiter of one process."""
        budget = Budget("trace", limit=self.limit, period="month")
        return AsyncBudgetLimiter(self.url, [budget], tenant=self.tenant, data_dir=self.data_dir, timeout=10)

    @property
    def now_s(self) -> float:
        """Seconds since the begin of the hour."""
        return (time.time() - self.begins_at) * self.speedup


@dataclass(frozen=True, slots=True)
class Sample:
    """The figures of the window at one time, in dollars."""

    at_s: float
    spent: float
    counted: float
    """Spent, held and unconfirmed."""


def read_trace(requests_max: int | None = None) -> list[Request]:
    """Read the trace, or its first requests."""
    with TRACE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:requests_max]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Request((at - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for at, row in zip(times, rows, strict=True)
    ]


# -- in each process ---------------------------------------------------------------------------------------------------


def replay_requests(replay: Replay, requests: list[Request]) -> list[bool]:
    """Replay some of the requests; return whether each was admitted."""
    return asyncio.run(_replay_all(replay, requests))


async def _replay_all(replay: Replay, requests: list[Request]) -> list[bool]:
    async with replay.limiter() as limiter:
        meter = Meter(limiter, ["trace"], Prices())
        return await asyncio.gather(*(_replay_one(replay, meter, request) for request in requests))


async def _replay_one(replay: Replay, meter: Meter, request: Request) -> bool:
    await asyncio.sleep(max(0.0, request.at_s - replay.now_s) / replay.speedup)
    call = meter.call(
        provider=PROVIDER,
        model=replay.model,
        input_tokens_max=request.input_tokens,
        output_tokens_max=OUTPUT_TOKENS_MAX,
    )
    with suppress(BudgetExceeded):
        async with call:
            await asyncio.sleep(request.output_tokens / TOKENS_PER_S / replay.speedup)
            call.finish(Usage(request.input_tokens, request.output_tokens))
        return True
    return False


# -- in the main process -----------------------------------------------------------------------------------------------


async def run(replay: Replay, requests: list[Request], processes: int) -> tuple[list[bool], list[Sample]]:
    """Replay the trace in several processes, and sample the window meanwhile."""
    loop = asyncio.get_running_loop()
    samples: list[Sample] = []
    async with replay.limiter() as limiter:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            shares = [requests[first::processes] for first in range(processes)]
            jobs = (loop.run_in_executor(pool, replay_requests, replay, share) for share in shares)
            results = asyncio.gather(*jobs)
            while not results.done():
                samples.append(await _sample(replay, limiter))
                await asyncio.wait([results], timeout=0.05)
            admitted = await results
        samples.append(await _sample(replay, limiter))
    flags = [False] * len(requests)
    for first, share in enumerate(admitted):
        flags[first::processes] = share
    return flags, samples


async def _sample(replay: Replay, limiter: AsyncBudgetLimiter) -> Sample:
    status = await limiter.status("trace")
    counted = status.spent + status.held + status.unconfirmed
    return Sample(max(0.0, replay.now_s), float(status.spent), float(counted))


def main(arguments: list[str] | None = None) -> int:
    """Run the replay; return 1 if the cap was exceeded, or a bill was not exact."""
    given = _parser().parse_args(arguments)
    requests = read_trace(given.requests)
    prices, now = Prices(), datetime.now(UTC)
    costs = [
        prices.price(PROVIDER, given.model, Usage(request.input_tokens, request.output_tokens), now).nanos
        for request in requests
    ]
    with tempfile.TemporaryDirectory() as directory:
        begins_at = time.time() + 1.5 + given.processes / 2  # leaves time for all processes to start
        tenant = f"replay-{secrets.token_hex(4)}"
        replay = Replay(given.store, directory, tenant, given.limit, given.model, begins_at, given.speedup)
        admitted, samples = asyncio.run(run(replay, requests, given.processes))
    billed = sum(cost for cost, is_admitted in zip(costs, admitted, strict=True) if is_admitted)
    spent, highest, limit = samples[-1].spent, max(sample.counted for sample in samples), float(given.limit)
    exact = round(spent * 1e9) == billed
    print(f"{len(requests):,} requests in {requests[-1].at_s / 60:.0f} minutes, worth ${sum(costs) / 1e9:.6f}")
    print(f"{sum(admitted):,} admitted, {len(admitted) - sum(admitted):,} denied, by {given.processes} processes")
    print(f"spent ${spent:.9f} of ${limit:.2f}; billed ${billed / 1e9:.9f}: {'exactly' if exact else 'DIFFERENT'}")
    print(f"at most ${highest:.9f} was spent or held at any time: {'below' if highest <= limit else 'ABOVE'} the cap")
    if given.picture:
        draw(given.picture, requests, costs, samples, limit)
        print(f"drawn in {given.picture}")
    return 0 if exact and highest <= limit else 1


def draw(path: str, requests: list[Request], costs: list[int], samples: list[Sample], limit: float) -> None:
    """Draw the hour: the requested and the spent dollars, and the cap."""
    from matplotlib.figure import Figure

    requested = [total / 1e9 for total in itertools.accumulate(costs)]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    minutes = [sample.at_s / 60 for sample in samples]
    axes.plot([request.at_s / 60 for request in requests], requested, color="0.7", label="asked for")
    axes.fill_between(minutes, [sample.counted for sample in samples], color="tab:orange", alpha=0.4, label="held")
    axes.fill_between(minutes, [sample.spent for sample in samples], color="tab:blue", alpha=0.8, label="spent")
    axes.axhline(limit, color="tab:red", linestyle="--", label=f"cap, ${limit:.2f}")
    axes.set(xlabel="minutes", ylabel="dollars", xlim=(0, requests[-1].at_s / 60), ylim=(0, None))
    axes.set_title("One hour of a coding assistant, several processes, one cap")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.trace_replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--limit", default="10.00", help="the cap in dollars (default: 10.00)")
    parser.add_argument("--model", default="claude-haiku-4-5", help=f"a model of {PROVIDER}")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--requests", type=int, default=None, help="replay only the first requests of the trace")
    parser.add_argument("--speedup", type=float, default=120.0, help="seconds of the trace per second")
    parser.add_argument("--store", default=None, metavar="URL", help="default: a temporary embedded server")
    parser.add_argument(
        "--picture",
        default="trace_replay.png",
        metavar="FILE",
        help="a .png or .svg file for the picture; '' for none (default: trace_replay.png in the current directory)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
