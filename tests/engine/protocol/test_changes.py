"""The log of changes: entries, pages and cursors, on a real server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import redis

from ktrdr_budget import AsyncBudgetLimiter, Budget, InvalidArgument, StoreError
from ktrdr_budget.engine.protocol.changes import parse_change
from ktrdr_budget.models import Change

from ...helpers.repairs import replayed

BUDGETS = [Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens")]
LOG = "ktrdr:{default}:changes"
KEPT = 10_000
AT = datetime(2025, 12, 1, 12, 0, 0, 123_000, UTC)


def entry(number: int) -> str:
    return f"{number} 1764590400123456 key ci - - - -"


def pushed(client: redis.Redis, first: int, last: int) -> None:
    """Write entries with these numbers, as the scripts do."""
    client.rpush(LOG, *map(entry, range(first, last + 1)))


def outline(change: Change) -> tuple[str, str, str]:
    return change.name, change.before, change.after


@pytest.mark.parametrize(
    ("words", "before", "after"),
    [
        ("limit agent - - 5000000000,0,usd -", "", "$5.00"),
        ("limit agent - 5000000000,1764633600000,usd -,0,usd -", "$5.00 until 2025-12-02T00:00:00Z", "unlimited"),
        ("limit agent - 1000000,1764633600001,tokens - -", "1000000 tokens until 2025-12-02T00:00:00.001Z", ""),
        ("key ci - - use;0;-;- -", "", "use"),
        (
            "key ci - read;1764633600000;team=quant;model,user - -",
            "read; scope team=quant; may set model,user; until 2025-12-02T00:00:00Z",
            "",
        ),
        ("definition agent - - a%20text -", "", "a text"),
    ],
    ids=["a first limit", "an uncapped limit", "a cleared limit", "a new key", "a revoked key", "another kind"],
)
def test_an_entry_of_the_log_is_parsed_into_readable_texts(words, before, after):
    change = parse_change(f"7 1764590400123456 {words}")
    assert (change.number, change.at) == (7, AT)
    assert (change.before, change.after) == (before, after)


def test_the_author_and_the_reason_of_a_change_may_be_any_text():
    change = parse_change("1 1764590400123456 limit agent a%20b%7C - 1,0,tokens a%20%2D%0Alonger%20job")
    assert (change.by, change.reason) == ("a b|", "a -\nlonger job")


async def test_each_change_of_a_limit_is_logged_with_its_author_and_reason(limiter):
    now = await limiter.set_limit("agent", "10.00", by="ops", reason="a long - backtest|")
    await limiter.set_limit("agent", "0", until="window")
    await limiter.set_limit("tokens", None)
    await limiter.clear_limit("agent", by="ops", reason="done")
    page = await limiter.changes()
    until = now.resets_at.isoformat()[:-6] + "Z"
    assert [outline(change) for change in reversed(page.items)] == [
        ("agent", "", "$10.00"),
        ("agent", "$10.00", f"$0.00 until {until}"),
        ("tokens", "", "unlimited"),
        ("agent", f"$0.00 until {until}", ""),
    ]
    assert [change.number for change in page] == [4, 3, 2, 1]
    assert {change.kind for change in page} == {"limit"}
    assert [(change.by, change.reason) for change in (page[3], page[2])] == [("ops", "a long - backtest|"), ("", "")]
    assert abs(page[3].at - now.as_of) < timedelta(minutes=1)
    assert (page.next_cursor, page.trimmed) == (None, False)


async def test_a_limit_that_is_set_or_cleared_again_is_not_logged_again(limiter):
    for _ in range(2):
        await limiter.clear_limit("agent")
    assert len(await limiter.changes()) == 0
    for _ in range(2):
        await limiter.set_limit("agent", "10.00")
    for _ in range(2):
        await limiter.clear_limit("agent")
    assert len(await limiter.changes()) == 2


async def test_a_limit_that_has_ended_is_not_logged_as_the_limit_before(clocked_server):
    async with AsyncBudgetLimiter(clocked_server.url, BUDGETS) as limiter:
        await limiter.set_limit("agent", "10.00", clocked_server.now() + timedelta(hours=1))
        clocked_server.advance(7200)
        await limiter.clear_limit("agent")
        await limiter.set_limit("agent", "3.00")
        assert [outline(change)[1:] for change in await limiter.changes(limit=1)] == [("", "$3.00")]
        assert len(await limiter.changes()) == 2


async def test_the_pages_of_the_log_lead_from_the_newest_entry_to_the_oldest(limiter, client):
    pushed(client, 1, 5)
    found, cursor = [], None
    while True:
        page = await limiter.changes(limit=2, cursor=cursor)
        found.append([change.number for change in page])
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == [[5, 4], [3, 2], [1]]
    assert not (await limiter.changes(limit=5)).next_cursor


async def test_the_log_keeps_the_last_ten_thousand_entries_and_their_numbers(limiter, client):
    pushed(client, 1, KEPT)
    await limiter.set_limit("agent", "10.00")
    assert client.llen(LOG) == KEPT
    page = await limiter.changes(limit=1)
    assert (page[0].number, page.next_cursor) == (KEPT + 1, str(KEPT + 1))
    oldest = await limiter.changes(limit=10, cursor="4")
    assert ([change.number for change in oldest], oldest.next_cursor, oldest.trimmed) == ([3, 2], None, False)
    for cursor in ("2", "1", str(KEPT + 3)):
        page = await limiter.changes(limit=1, cursor=cursor)
        assert (page[0].number, page.trimmed) == (KEPT + 1, True), "the page starts again at the newest entry"


async def test_a_cursor_of_a_log_that_the_store_has_lost_restarts_at_the_newest_entry(limiter):
    page = await limiter.changes(cursor="9")
    assert (len(page), page.next_cursor, page.trimmed) == (0, None, True)


@pytest.mark.parametrize("cursor", ["", "0", "-1", "1.0", "x", 1])
async def test_an_invalid_cursor_of_the_log_is_refused(limiter, cursor):
    with pytest.raises(InvalidArgument):
        await limiter.changes(cursor=cursor)


async def test_a_limit_that_is_replayed_after_a_data_loss_is_not_logged(limiter, client):
    await limiter.set_limit("agent", "10.00")
    await limiter.record("agent", "0.01")
    client.flushall()
    await replayed(limiter, 1)
    assert (await limiter.status("agent")).limit == 10
    assert len(await limiter.changes()) == 0


async def test_if_the_log_cannot_be_written_the_limit_is_not_changed(limiter, client):
    client.set(LOG, "damaged")
    with pytest.raises(StoreError):
        await limiter.set_limit("agent", "10.00")
    assert (await limiter.status("agent")).limit == 5
