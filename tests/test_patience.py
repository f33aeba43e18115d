"""The timeouts of limiters in this test run, and stalls of the machine."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import time

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


def test_outside_the_test_run_the_default_timeout_is_one_second():
    assert inspect.signature(LimiterBase.__init__).parameters["timeout"].default == 1.0
    code = (
        "from ktrdr_budget import BudgetLimiter as Limiter; made = Limiter('redis://127.0.0.1:1');"
        "print(made.engine.dispatcher.timeout_s, made.engine.dispatcher.background.timeout_s)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "1.0 1.0\n"


def test_the_longer_timeout_applies_only_to_reachable_servers_that_the_test_run_has_started(start_server):
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


async def test_in_the_test_run_a_call_succeeds_even_if_the_store_stalls_for_longer_than_the_timeout(start_server):
    own = start_server()
    async with AsyncBudgetLimiter(own.url, BUDGETS, timeout=0.2) as limiter:
        assert own.process is not None
        own.process.send_signal(signal.SIGSTOP)  # as a busy machine would; the store stays marked as reachable
        waiting = asyncio.create_task(limiter.record("agent", "0.01"))
        done, _ = await asyncio.wait([waiting], timeout=0.6)
        own.process.send_signal(signal.SIGCONT)
        assert not done
        assert (await waiting).state == "recorded"
    own.kill()


def test_a_stopwatch_does_not_count_time_while_the_process_is_stopped():
    before = time.monotonic()
    with Stopwatch() as took:
        with subprocess.Popen([sys.executable, "-c", STALL, str(os.getpid())]) as stalling:
            while stalling.poll() is None:
                time.sleep(0.01)
    assert time.monotonic() - before > 1.5
    assert took.seconds < time.monotonic() - before - 1.0
