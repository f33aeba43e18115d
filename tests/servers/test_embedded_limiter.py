"""The limiter on the embedded server: no URL, no configuration."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import redis

from ktrdr_budget import AsyncBudgetLimiter, Budget, BudgetLimiter, StoreUnavailable

pytestmark = pytest.mark.server


def server_pid(limiter: BudgetLimiter) -> int:
    with redis.Redis.from_url(str(limiter.store_address)) as client:
        return int(client.info("server")["process_id"])


def test_a_limiter_without_a_url_starts_an_embedded_server_and_keeps_the_spend_after_a_restart(tmp_path: Path):
    with BudgetLimiter(None, [Budget("agent", "1")], data_dir=tmp_path / "d", timeout=20.0) as limiter:
        limiter.reserve("agent", "0.25").commit("0.20")
    with BudgetLimiter(None, [Budget("agent", "1")], data_dir=tmp_path / "d", timeout=20.0) as limiter:
        assert str(limiter.status("agent").spent) == "0.20"


async def test_limiters_of_one_process_share_one_embedded_server(tmp_path: Path):
    budgets = [Budget("agent", "1")]
    async with AsyncBudgetLimiter(None, budgets, data_dir=tmp_path / "d", timeout=20.0) as one:
        async with AsyncBudgetLimiter(None, budgets, data_dir=tmp_path / "d", timeout=20.0) as other:
            await one.reserve("agent", "0.60")
            assert str((await other.status("agent")).remaining) == "0.40"
        assert str((await one.status("agent")).remaining) == "0.40"


def test_a_limiter_restarts_its_embedded_server_after_the_server_and_supervisor_were_killed(tmp_path: Path):
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
