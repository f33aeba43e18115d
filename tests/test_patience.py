"""The tests' own patience: who has how much time, and what a stall of the machine counts."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import time

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter
from ktrdr_budget.limiter import LimiterBase

from .helpers.patience import PATIENT_S, away, hurried
from .helpers.stopwatch import Stopwatch

BUDGETS = [Budget("agent", "5.00")]
STALL = """
import os, signal, sys, time
os.kill(int(sys.argv[1]), signal.SIGSTOP)
time.sleep(1.5)
os.kill(int(sys.argv[1]), signal.SIGCONT)
"""


def deadline_s(limiter: LimiterBase) -> float:
    return limiter.engine.dispatcher.timeout_s


def test_without_these_tests_a_call_has_a_second():
    assert inspect.signature(LimiterBase.__init__).parameters["timeout"].default == 1.0
    code = (
        "from ktrdr_budget import BudgetLimiter as Limiter; made = Limiter('redis://127.0.0.1:1');"
        "print(made.engine.dispatcher.timeout_s, made.engine.dispatcher.background.timeout_s)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "1.0 1.0\n"


def test_what_a_limiter_is_told_holds_while_its_store_is_away_and_for_stores_of_others(start_server):
    own = start_server()
    limiter = BudgetLimiter(own.url, BUDGETS, timeout=0.2)
    assert deadline_s(limiter) == PATIENT_S
    own.pause()
    assert deadline_s(limiter) == 0.2
    own.resume()
    assert deadline_s(limiter) == PATIENT_S
    with away(own.url):
        assert deadline_s(limiter) == 0.2
    own.kill()
    assert deadline_s(limiter) == 0.2
    elsewhere = BudgetLimiter("redis://127.0.0.1:1", BUDGETS, timeout=3.0)
    assert deadline_s(elsewhere) == 3.0
    with hurried(elsewhere, 0.1):
        assert deadline_s(elsewhere) == 0.1
    assert deadline_s(elsewhere) == 3.0


async def test_a_store_that_stalls_for_longer_than_a_deadline_is_waited_for(start_server):
    own = start_server()
    async with AsyncBudgetLimiter(own.url, BUDGETS, timeout=0.2) as limiter:
        assert own.process is not None
        own.process.send_signal(signal.SIGSTOP)  # by the machine: nobody has said that it is away
        waiting = asyncio.create_task(limiter.record("agent", "0.01"))
        done, _ = await asyncio.wait([waiting], timeout=0.6)
        own.process.send_signal(signal.SIGCONT)
        assert not done
        assert (await waiting).state == "recorded"
    own.kill()


def test_a_stall_of_this_process_is_no_elapsed_time():
    before = time.monotonic()
    with Stopwatch() as took:
        with subprocess.Popen([sys.executable, "-c", STALL, str(os.getpid())]) as stalling:
            while stalling.poll() is None:
                time.sleep(0.01)
    assert time.monotonic() - before > 1.5
    assert took.seconds < time.monotonic() - before - 1.0


@pytest.mark.timely
def test_what_is_timely_has_further_tries(request: pytest.FixtureRequest):
    tries = request.config.stash.setdefault(TRIES, [])
    tries.append(signal.SIGSTOP)
    assert len(tries) > 1


TRIES = pytest.StashKey[list]()
