"""Error messages: the cause, in the terms and units of the caller."""

from __future__ import annotations

import ast
import re
import threading
from pathlib import Path

import pytest

from ktrdr_budget import Budget, BudgetLimiter, HoldConflict, InvalidAmount, UnknownBudget

BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens"), Budget("jobs", 2, kind="slots")]


def refusal(kind, call, *args, **options) -> str:
    with pytest.raises(kind) as refused:
        call(*args, **options)
    return str(refused.value)


# -- conflicts ---------------------------------------------------------------------------------------------------------


def test_the_message_of_a_conflict_with_a_committed_hold_shows_the_committed_amount(sync_limiter):
    limiter = sync_limiter
    hold = limiter.reserve("agent", "0.15", id="op_1")
    limiter.commit("op_1", "0.07")
    committed = "hold 'op_1' was already committed at $0.07; it cannot be"
    assert refusal(HoldConflict, limiter.release, "op_1") == f"{committed} released"
    assert refusal(HoldConflict, limiter.release, "op_1", operator=True) == f"{committed} released"
    assert refusal(HoldConflict, limiter.commit, "op_1", "0.08") == f"{committed} committed at another amount"
    assert refusal(HoldConflict, limiter.extend, "op_1") == f"{committed} extended"
    assert refusal(HoldConflict, hold.grow, "0.10") == "hold 'op_1' was already committed at $0.07; it cannot grow"
    again = "hold 'op_1' was already committed at $0.07; its id cannot be used again with other contents"
    assert refusal(HoldConflict, limiter.reserve, "agent", "0.20", id="op_1") == again
    assert refusal(HoldConflict, limiter.record, "agent", "0.20", id="op_1") == again


def test_the_message_of_a_conflict_with_a_released_hold_says_that_the_hold_was_released(sync_limiter):
    sync_limiter.reserve("agent", "0.15", id="op_1").release()
    released = "hold 'op_1' was already released; it cannot be"
    assert refusal(HoldConflict, sync_limiter.commit, "op_1", "0.07") == f"{released} committed"
    assert refusal(HoldConflict, sync_limiter.extend, "op_1") == f"{released} extended"


def test_if_an_id_is_reused_with_other_contents_the_message_describes_the_first_request(sync_limiter):
    sync_limiter.reserve({"agent": "0.15", "tokens": 40, "jobs": 1}, id="op_1")
    assert refusal(HoldConflict, sync_limiter.reserve, "agent", "0.15", id="op_1") == (
        "hold 'op_1' was reserved at agent $0.15, tokens 40 tokens and is open; "
        "its id cannot be used again with other contents"
    )
    sync_limiter.record("tokens", 7, id="op_2")
    assert refusal(HoldConflict, sync_limiter.record, "tokens", 8, id="op_2") == (
        "hold 'op_2' was recorded at 7 tokens; its id cannot be used again with other contents"
    )
    assert refusal(HoldConflict, sync_limiter.release, "op_2") == (
        "hold 'op_2' was recorded at 7 tokens; it cannot be released"
    )


def test_the_message_of_a_conflict_with_a_hold_of_60_budgets_lists_only_three_amounts(server):
    budgets = [Budget(f"b{number}", 5) for number in range(60)]
    with BudgetLimiter(server.url, budgets) as limiter:
        limiter.reserve({budget.name: "0.15" for budget in budgets}, id="op_1")
        limiter.commit("op_1", "0.07")
        assert refusal(HoldConflict, limiter.release, "op_1") == (
            "hold 'op_1' was already committed at b0 $0.07, b1 $0.07, b2 $0.07, … (60 budgets); it cannot be released"
        )


def test_if_an_id_is_reused_during_an_outage_the_message_describes_the_first_request(start_server):
    own = start_server()
    with BudgetLimiter(own.url, BUDGETS, on_store_error="allow", timeout=0.2) as limiter:
        limiter.status("agent")
        own.kill()
        limiter.reserve("agent", "0.15", id="op_1")
        assert refusal(HoldConflict, limiter.reserve, "agent", "0.20", id="op_1") == (
            "hold 'op_1' was reserved at $0.15 and is open; its id cannot be used again with other contents"
        )
        own.start()


# -- amounts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", ["-0.5", "abc", "nan"])
def test_every_call_rejects_an_invalid_amount_with_the_same_message(sync_limiter, amount):
    limiter = sync_limiter
    words = f"{amount!r} is not an amount; use a non-negative decimal such as 0.15"
    hold = limiter.reserve("agent", "0.15", id="op_1")
    for call in (limiter.reserve, limiter.record, limiter.set_limit):
        assert refusal(InvalidAmount, call, "agent", amount) == words
    for given in (amount, {"agent": amount}):
        assert refusal(InvalidAmount, limiter.commit, "op_1", given) == words
        assert refusal(InvalidAmount, limiter.extend, "op_1", accrued=given) == words
    for call in (hold.accrue, hold.grow, hold.commit):
        assert refusal(InvalidAmount, call, amount) == words
    assert refusal(InvalidAmount, Budget, "agent", amount) == words


def test_if_an_accrued_sum_is_too_large_the_message_states_the_bound_in_the_unit_of_the_budget(sync_limiter):
    hold = sync_limiter.reserve({"agent": "1", "tokens": 1})
    hold.accrue({"agent": "9007199.25", "tokens": 2**53 - 1})
    assert "must be below $9,007,199.25" in refusal(InvalidAmount, hold.accrue, {"agent": "0.01"})
    assert "must be below 9,007,199,254,740,992 tokens" in refusal(InvalidAmount, hold.accrue, {"tokens": 1})


def test_the_repr_of_a_hold_of_one_nano_dollar_has_no_exponent(sync_limiter):
    hold = sync_limiter.reserve({"agent": "0.000000001", "tokens": 1}, id="op_1")
    assert repr(hold) == "<Hold op_1 open agent=0.000000001, tokens=1>"


# -- names -------------------------------------------------------------------------------------------------------------


def test_if_few_budgets_exist_the_error_for_an_unknown_budget_lists_all_names(sync_limiter):
    assert refusal(UnknownBudget, sync_limiter.reserve, "agnet", 1) == (
        "unknown budget 'agnet'; this limiter has: agent, tokens, jobs"
    )
    hold = sync_limiter.reserve("agent", "0.15")
    assert refusal(UnknownBudget, hold.commit, {"agnet": 1}) == "unknown budget 'agnet'; this hold has: agent"


# -- closed limiters ---------------------------------------------------------------------------------------------------


def test_a_call_to_a_closed_limiter_raises_a_runtime_error(server):
    limiter = BudgetLimiter(server.url, BUDGETS)
    limiter.status("agent")
    limiter.close()
    limiter.close()
    with pytest.raises(RuntimeError, match="^this limiter is closed$") as refused:
        limiter.status("agent")
    assert type(refused.value) is RuntimeError


def test_if_another_thread_closes_the_limiter_a_call_in_progress_raises_only_public_errors(start_server):
    own = start_server()
    limiter = BudgetLimiter(own.url, BUDGETS, timeout=1)
    limiter.status("agent")
    own.pause()
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            limiter.status("agent")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        limiter.close()
    finally:
        own.resume()
        thread.join()
    assert [type(error).__module__.split(".")[0] for error in errors] in (["builtins"], ["ktrdr_budget"], [])
    assert not any(type(error).__name__.startswith("_") for error in errors)


# -- the log -----------------------------------------------------------------------------------------------------------


def test_every_message_and_metric_on_the_page_about_faults_exists_in_the_package():
    root = Path(__file__).parents[1]
    sources = (path.read_text(encoding="utf-8") for path in (root / "ktrdr_budget").rglob("*.py"))
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    page = (root / "docs" / "faults.md").read_text(encoding="utf-8")
    [seen] = re.findall(r"^\| you see .*?\n\n", page, re.MULTILINE | re.DOTALL)
    listed = [text for row in seen.splitlines() for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    fragments = [part.strip(" :,") for text in listed for part in text.split("…")]
    missing = [part for part in fragments if part and not any(part in text for text in texts)]
    assert len(listed) > 10
    assert not missing
