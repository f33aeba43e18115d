"""The limiter on the embedded server, as a newcomer uses it: no URL, no configuration."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter, StoreUnavailable
from ktrdr_budget.engine.protocol import Command

from .helpers.stores import store_of


def server_pid(limiter: BudgetLimiter) -> int:
    async def ask() -> bytes:
        return await store_of(limiter).run(
            Command(None, (), ("INFO", "server")), asyncio.get_running_loop().time() + 30
        )

    found = re.search(rb"process_id:(\d+)", limiter._portal.run(ask()))
    assert found
    return int(found[1])


def test_a_limiter_without_a_url_starts_a_server_and_its_spend_survives(tmp_path: Path):
    with BudgetLimiter(None, [Budget("agent", "1")], data_dir=tmp_path / "d", timeout=20.0) as limiter:
        limiter.reserve("agent", "0.25").commit("0.20")
    with BudgetLimiter(None, [Budget("agent", "1")], data_dir=tmp_path / "d", timeout=20.0) as limiter:
        assert str(limiter.status("agent").spent) == "0.20"


async def test_several_limiters_of_a_process_share_the_server(tmp_path: Path):
    budgets = [Budget("agent", "1")]
    async with AsyncBudgetLimiter(None, budgets, data_dir=tmp_path / "d", timeout=20.0) as one:
        async with AsyncBudgetLimiter(None, budgets, data_dir=tmp_path / "d", timeout=20.0) as other:
            await one.reserve("agent", "0.60")
            assert str((await other.status("agent")).remaining) == "0.40"
        assert str((await one.status("agent")).remaining) == "0.40"


def test_the_server_and_its_supervisor_are_killed_and_the_limiter_brings_them_back(tmp_path: Path):
    with BudgetLimiter(None, [Budget("agent", "1")], data_dir=tmp_path / "d", timeout=20.0) as limiter:
        limiter.record("agent", "0.10")
        server = server_pid(limiter)
        supervisor = int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(supervisor, signal.SIGKILL)
        os.kill(server, signal.SIGKILL)
        ends = time.monotonic() + 60
        while True:
            try:
                assert str(limiter.status("agent").spent) == "0.10"
                break
            except StoreUnavailable:
                assert time.monotonic() < ends
        assert limiter.losses == 0
