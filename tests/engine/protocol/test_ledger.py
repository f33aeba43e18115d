"""Ledgers are lists of numbered entries: pages, cursors and trimming, on a real server."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget, InvalidArgument
from ktrdr_budget.audit import Auditor
from ktrdr_budget.engine.protocol.ledger import StoredEntry, parse_entry, public_entry
from ktrdr_budget.engine.replica.state import ReplicaState

from ...helpers.keyspace import Entry, ledger_entries, ledger_key, sums

LENGTH_MAX = 8
CENT = Decimal("0.01")


@pytest.fixture
def short_ledgers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledgers are trimmed above eight entries, to four."""
    defaults = {**ReplicaState.__init__.__kwdefaults__, "ledger_entries_max": LENGTH_MAX}
    monkeypatch.setattr(ReplicaState.__init__, "__kwdefaults__", defaults)


@pytest.fixture
async def limiter(server, short_ledgers):
    async with AsyncBudgetLimiter(server.url, [Budget("agent", "50.00")]) as made:
        yield made


async def record(limiter: AsyncBudgetLimiter, *numbers: int) -> None:
    for number in numbers:
        await limiter.record("agent", "0.01", id=f"op_{number}", operation=f"call {number}")


async def numbers_of_pages(limiter: AsyncBudgetLimiter, limit: int) -> list[str]:
    found, cursor = [], None
    while True:
        page = await limiter.ledger("agent", limit=limit, cursor=cursor)
        assert not page.trimmed
        found += [entry.entry_id for entry in page]
        if page.next_cursor is None:
            return found
        cursor = page.next_cursor


def test_the_text_of_a_ledger_entry_is_parsed_into_its_fields():
    entry = parse_entry(b"1763899200123456 -150 correction op_1 a%20call t1 team=quant,user=alice")
    scope = "team=quant,user=alice"
    assert entry == StoredEntry(1763899200123456, -150, "correction", "op_1", "a call", "t1", 0, scope)
    public = public_entry(entry, 7, "usd")
    assert (public.entry_id, public.hold_id, public.amount) == ("7", "op_1", Decimal("-0.00000015"))
    assert public.at.isoformat() == "2025-11-23T12:00:00.123000+00:00"
    assert public.scope == {"team": "quant", "user": "alice"}
    assert public_entry(parse_entry("1763899200123456 5 commit op_1 - - -"), 8, "usd").scope == {}


def test_a_ledger_summary_has_the_number_of_trimmed_entries_but_no_entry_id():
    summary = parse_entry("1763899200123456 90 carried 9 - - -")
    assert (summary.trimmed_count, summary.hold_id) == (9, "")
    assert public_entry(summary, 9, "usd").entry_id == ""
    missing = parse_entry("1763899200123456 90 carried - ledger%20%2B90 - -")
    assert missing.trimmed_count == 0, "the entry of a repair is no summary"


@pytest.mark.parametrize("text", ["", "1763899200123456", "1763899200123456 - commit op_1 - - -", "a 1 commit o - - -"])
def test_parsing_a_malformed_ledger_entry_is_an_error(text):
    with pytest.raises(ValueError, match=r"unpack|invalid literal"):
        parse_entry(text)


async def test_the_ledger_entry_of_recorded_spend_has_a_time_an_amount_and_labels(client, limiter):
    await record(limiter, 1)
    [entry] = ledger_entries(client, ledger_key(client))
    assert entry == Entry(entry.time_us, 10_000_000, "record", "op_1", "call%201", "-", "-")
    assert 0 <= client.time()[0] - entry.time_us // 1_000_000 < 60


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_ledger_pages_contain_each_entry_once_with_the_newest_first(limiter, limit):
    await record(limiter, *range(1, 8))
    assert await numbers_of_pages(limiter, limit) == ["7", "6", "5", "4", "3", "2", "1"]


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_entry_numbers_do_not_change_when_older_entries_are_trimmed(client, limiter, limit):
    await record(limiter, *range(1, 12))
    page = await limiter.ledger("agent")
    assert [entry.entry_id for entry in page] == ["11", "10", "9", "8", "7", "6", ""]
    assert page[-1].kind == "carried" and page[-1].amount == 5 * CENT
    assert [entry.hold_id for entry in page] == ["op_11", "op_10", "op_9", "op_8", "op_7", "op_6", ""]
    assert sum(entry.amount for entry in page) == (await limiter.status("agent")).spent == 11 * CENT
    assert await numbers_of_pages(limiter, limit) == ["11", "10", "9", "8", "7", "6", ""]


async def test_each_trim_of_a_ledger_merges_the_earlier_summary_into_the_new_summary(client, limiter):
    await record(limiter, *range(1, 31))
    summary, *others = ledger_entries(client, ledger_key(client))
    assert int(summary.hold_id) + len(others) == 30 and len(others) < LENGTH_MAX
    assert summary.units + sum(entry.units for entry in others) == sums(client)["spent"] == 300_000_000


async def test_a_page_starts_at_the_newest_entry_if_the_entries_at_its_cursor_were_trimmed(limiter):
    await record(limiter, *range(1, 8))
    first = await limiter.ledger("agent", limit=3)
    assert first.next_cursor == "5"
    await record(limiter, 8, 9)  # entries 1 to 5 become a summary
    page = await limiter.ledger("agent", limit=3, cursor=first.next_cursor)
    assert page.trimmed
    assert [entry.entry_id for entry in page] == ["9", "8", "7"]
    rest = await limiter.ledger("agent", limit=3, cursor=page.next_cursor)
    assert not rest.trimmed
    assert [entry.entry_id for entry in rest] == ["6", ""]


async def test_the_page_after_the_oldest_kept_entry_has_only_the_summary(limiter):
    await record(limiter, *range(1, 10))
    page = await limiter.ledger("agent", cursor="6")
    assert ([entry.entry_id for entry in page], page.trimmed, page.next_cursor) == ([""], False, None)


async def test_a_page_starts_at_the_newest_entry_if_its_cursor_is_beyond_that_entry(limiter):
    await record(limiter, 1, 2)
    page = await limiter.ledger("agent", cursor="5")
    assert ([entry.entry_id for entry in page], page.trimmed) == (["2", "1"], True)


async def test_the_page_after_the_oldest_entry_is_empty(limiter):
    await record(limiter, 1, 2)
    page = await limiter.ledger("agent", cursor="1")
    assert (page.items, page.trimmed, page.next_cursor) == ((), False, None)


@pytest.mark.parametrize("cursor", ["", "0", "-1", "1-0", "01", "x", "1" * 17, 5])
async def test_invalid_cursors_are_refused(limiter, cursor):
    with pytest.raises(InvalidArgument, match="invalid cursor"):
        await limiter.ledger("agent", cursor=cursor)


async def test_a_ledger_written_again_after_a_deletion_has_the_same_expiry_as_before(client, limiter):
    await record(limiter, 1)
    ttl_ms, key = client.pttl(ledger_key(client)), ledger_key(client)
    client.delete(key)
    await record(limiter, 2)
    assert abs(client.pttl(key) - ttl_ms) < 60_000


async def test_a_repeated_audit_of_a_trimmed_ledger_reads_only_the_new_entries(server, client, limiter):
    with Auditor(server.url) as auditor:
        for first in range(1, 40, 3):
            await record(limiter, first, first + 1, first + 2)
            [report] = auditor.check()
            assert report.conclusive and report.adds_up
            assert report.unconfirmed_sum == 0, "the auditor had read the trimmed entries"
    assert parse_entry(client.lindex(ledger_key(client), 0)).trimmed_count > 0
    with Auditor(server.url) as another:
        [report] = another.check()
        assert report.adds_up and report.unconfirmed_sum is None, "unconfirmed charges may be in the summary"


@pytest.mark.parametrize("damage", ["removed", "changed"])
async def test_a_repeated_audit_fails_if_a_ledger_entry_was_removed_or_changed_meanwhile(
    server, client, limiter, damage
):
    await record(limiter, 1, 2, 3)
    with Auditor(server.url) as auditor:
        assert all(report.adds_up for report in auditor.check())
        key = ledger_key(client)
        if damage == "removed":
            client.lpop(key)
        else:
            client.lset(key, -1, client.lindex(key, -1).replace(" 10000000 ", " 20000000 "))
        assert not any(report.adds_up for report in auditor.check())
        await record(limiter, 4)
        assert not any(report.adds_up for report in auditor.check())
