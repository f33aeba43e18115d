"""One hour of real traffic against a cap that it exceeds, by four processes: ``python -m examples.trace_replay``.

The trace (``data/README.md``) tells when each request came, how long its prompt was and how much was answered. Each is
priced by a real model's price list, reserved at its worst case, and committed at its cost, while the hour passes in
half a minute. The spend never passes the cap, and what was admitted is billed exactly: the run checks both, prints a
summary, and draws the hour.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
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
"""What each request would ask for as ``max_tokens``; the longest answer of the trace has 1,899."""
TOKENS_PER_S = 60
"""How fast answers are made: so long is a request under way."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the trace."""

    at_s: float
    """Since the first one."""
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Replay:
    """What every process must know."""

    url: str | None
    data_dir: str
    tenant: str
    limit: str
    model: str
    begins_at: float
    """When the hour begins, by the clock of this machine."""
    speedup: float

    def limiter(self) -> AsyncBudgetLimiter:
        """One per process, as if each were a machine."""
        budget = Budget("trace", limit=self.limit, period="month")
        return AsyncBudgetLimiter(self.url, [budget], tenant=self.tenant, data_dir=self.data_dir, timeout=10)

    @property
    def now_s(self) -> float:
        """Seconds of the hour that have passed."""
        return (time.time() - self.begins_at) * self.speedup


@dataclass(frozen=True, slots=True)
class Sample:
    """The window at one moment of the hour, in dollars."""

    at_s: float
    spent: float
    counted: float
    """Spent, held and unconfirmed."""


def read_trace(requests_max: int | None = None) -> list[Request]:
    """The trace, or its beginning."""
    with TRACE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:requests_max]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Request((at - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for at, row in zip(times, rows, strict=True)
    ]


# -- one of the processes ----------------------------------------------------------------------------------------------


def work(replay: Replay, requests: list[Request]) -> list[bool]:
    """Replays some of the requests; for each, whether it was admitted."""
    return asyncio.run(_work(replay, requests))


async def _work(replay: Replay, requests: list[Request]) -> list[bool]:
    async with replay.limiter() as limiter:
        meter = Meter(limiter, ["trace"], Prices())
        return await asyncio.gather(*(_one(replay, meter, request) for request in requests))


async def _one(replay: Replay, meter: Meter, request: Request) -> bool:
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


# -- all of them -------------------------------------------------------------------------------------------------------


async def run(replay: Replay, requests: list[Request], processes: int) -> tuple[list[bool], list[Sample]]:
    """Replays the trace, and looks at the window all the while."""
    loop = asyncio.get_running_loop()
    samples: list[Sample] = []
    async with replay.limiter() as limiter:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            shares = [requests[first::processes] for first in range(processes)]
            working = asyncio.gather(*(loop.run_in_executor(pool, work, replay, share) for share in shares))
            while not working.done():
                samples.append(await _sample(replay, limiter))
                await asyncio.wait([working], timeout=0.05)
            admitted = await working
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
    """Runs what the arguments say; 1 if the cap was passed, or something was not billed exactly."""
    given = _parser().parse_args(arguments)
    requests = read_trace(given.requests)
    prices, now = Prices(), datetime.now(UTC)
    costs = [
        prices.price(PROVIDER, given.model, Usage(request.input_tokens, request.output_tokens), now).nanos
        for request in requests
    ]
    with tempfile.TemporaryDirectory() as directory:
        begins_at = time.time() + 1.5 + given.processes / 2  # when all of them have started
        tenant = f"replay-{secrets.token_hex(4)}"
        replay = Replay(given.store, directory, tenant, given.limit, given.model, begins_at, given.speedup)
        admitted, samples = asyncio.run(run(replay, requests, given.processes))
    billed = sum(cost for cost, went in zip(costs, admitted, strict=True) if went)
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
    """The hour as a picture: what was asked for, what was spent, and the cap."""
    from matplotlib.figure import Figure

    wanted, demand = 0, []
    for cost in costs:
        wanted += cost
        demand.append(wanted / 1e9)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    minutes = [sample.at_s / 60 for sample in samples]
    axes.plot([request.at_s / 60 for request in requests], demand, color="0.7", label="asked for")
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
    parser.add_argument("--model", default="claude-haiku-4-5", help=f"a model of {PROVIDER}, whose prices count")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--requests", type=int, default=None, help="only so many of the trace's first ones")
    parser.add_argument("--speedup", type=float, default=120.0, help="seconds of the trace in one second")
    parser.add_argument("--store", default=None, metavar="URL", help="by default an embedded server, thrown away after")
    parser.add_argument(
        "--picture",
        default="trace_replay.png",
        metavar="FILE",
        help="where the hour is drawn, .png or .svg (default: trace_replay.png in the current directory; '': nowhere)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
