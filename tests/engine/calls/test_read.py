"""Reads of budgets, holds and ledgers: what is read first, and how pages continue."""

from __future__ import annotations

import pytest

from ktrdr_budget import Budget, DefinitionConflict, InvalidArgument, StoreError, StoreUnavailable, UnknownHold
from ktrdr_budget.engine.calls.context import CallContext
from ktrdr_budget.engine.calls.read import hold_view, holds, ledger, status, statuses
from ktrdr_budget.engine.outage.allow import AllowPolicy
from ktrdr_budget.engine.protocol.codes import COMMITTED, UNCONFIRMED
from ktrdr_budget.engine.protocol.operations import Retire
from ktrdr_budget.engine.protocol.replies import Retired
from ktrdr_budget.engine.protocol.requests import Read

from ...helpers.calls import (
    NOT_SENT,
    NOW_MS,
    answer,
    answer_status,
    call_context,
    drive,
    found,
    hold_record,
    offline_hold,
)

AGENT, TOKENS = Budget("agent", "5.00"), Budget("tokens", 1000, unit="tokens")
RETIRED = answer(Retired())


@pytest.fixture
def context() -> CallContext:
    return call_context(AGENT, TOKENS)


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_a_status_with_due_holds_is_read_again_after_the_holds_are_retired(context):
    """Therefore the figures show such holds as unconfirmed."""
    due = found([hold_record(context, tokens=40, due=True).render()])
    replies = answer_status(due=("a",), held=40), due, RETIRED, answer_status(unconfirmed=40)
    requests, [now] = drive(status(context, ["tokens"]), *replies)
    assert [type(request) for request in requests] == [Read, Read, Retire, Read]
    assert (now.held, now.unconfirmed) == (0, 40)


def test_a_status_is_returned_even_if_a_due_hold_cannot_be_retired(context):
    due = found([hold_record(context, tokens=40, due=True).render()])
    replies = answer_status(due=("a",), held=40), due, RETIRED, answer_status(due=("a",), held=40)
    [now] = drive(status(context, ["tokens"]), *replies).result
    assert now.held == 40


def test_a_status_is_returned_after_64_reads_even_if_more_holds_are_due(context):
    """More holds may become due during each read."""
    rounds = [(answer_status(due=(f"h{number}",)), found([None]), RETIRED) for number in range(63)]
    replies = [reply for each in rounds for reply in each]
    assert drive(status(context, ["tokens"]), *replies, answer_status(due=("h63",), held=40)).result[0].held == 40


def test_a_status_is_read_again_if_its_window_has_ended(context):
    midnight_ms = context.state.current_window("tokens").span.end_ms

    def after_midnight(request):
        context.state.set_clock(midnight_ms * 1000, 0)
        return answer_status(spent=999, now_us=midnight_ms * 1000)

    later = answer_status(spent=1, now_us=midnight_ms * 1000)
    [now] = drive(status(context, ["tokens"]), after_midnight, later).result
    assert (now.window, now.spent) == ("2025-12-02", 1)


def test_only_a_complete_status_waits_for_the_replay_of_lost_data(context):
    [read], _ = drive(status(context, ["agent"]), answer_status())
    [complete], _ = drive(status(context, ["agent"], complete=True), answer_status())
    assert (read.while_recovering, complete.while_recovering) == ("answers", "waits")


def test_a_status_that_shows_a_limit_set_at_run_time_adds_the_limit_to_the_journal(context):
    drive(status(context, ["tokens"]), answer_status(runtime=f"2000 0 {NOW_MS}000"))
    [replayed] = context.state.journal.limits(context.state.keys, NOW_MS)
    assert (replayed.budget, replayed.limit) == ("tokens", 2000)


@pytest.mark.parametrize(
    ("figures", "error"),
    [
        ("WRONGTYPE", StoreError),
        (["", Budget("agent", 5, unit="tokens").definition, *"       "], DefinitionConflict),
    ],
    ids=["unreadable window", "other definition"],
)
def test_the_figures_of_other_budgets_are_returned_even_if_the_figures_of_one_budget_are_unknown(
    context, figures, error
):
    figures = [word.strip() for word in figures] if isinstance(figures, list) else figures
    _, fine = answer_status(spent=7)[1]
    found_all = drive(statuses(context), found([], figures, fine)).result
    assert [(each.budget, each.spent) for each in found_all] == [("tokens", 7)]
    assert [type(each) for each in found_all.unavailable.values()] == [error]
    drive(status(context, ["agent"]), found([], figures), raises=error)


# -- holds -------------------------------------------------------------------------------------------------------------


def test_a_hold_is_shown_with_the_state_and_the_amounts_from_the_store(context):
    _, view = drive(hold_view(context, "a"), found(hold_record(context, tokens=40).render()))
    assert (view.id, view.state, view.amounts) == ("a", "open", {"tokens": 40})


@pytest.mark.parametrize("reply", [NOT_SENT, found(None)], ids=["no reply", "unknown to the store"])
def test_a_hold_granted_offline_is_shown_from_the_memory_of_this_process(reply):
    context = call_context(TOKENS, policy=AllowPolicy)
    offline_hold(context, "a", tokens=40)
    assert drive(hold_view(context, "a"), reply).result.amounts == {"tokens": 40}
    drive(hold_view(context, "b"), reply, raises=StoreUnavailable if reply is NOT_SENT else UnknownHold)


def test_a_list_of_holds_has_the_open_and_the_unconfirmed_holds_of_one_budget(context):
    open_hold, unconfirmed = hold_record(context, tokens=1), hold_record(context, UNCONFIRMED, tokens=2)
    other, settled = hold_record(context, agent=3), hold_record(context, COMMITTED, tokens=4)
    replies = (
        answer_status(),
        found(["a", "b", "c"]), found([open_hold.render(), other.render(), settled.render()]),
        found(["d", "gone"]), found([unconfirmed.render(), None]),
    )  # fmt: skip
    requests, page = drive(holds(context, "tokens", 10, None), *replies)
    assert [view.id for view in page] == ["a", "d"]
    assert page.next_cursor is None
    keys = context.state.keys
    assert [request.keys[-1] for request in (requests[1], requests[3])] == [keys.due, keys.unconfirmed]


def test_a_list_of_holds_continues_at_the_cursor_of_the_previous_page(context):
    texts = [hold_record(context, tokens=number).render() for number in (1, 2, 3)]
    _, page = drive(holds(context, "tokens", 2, None), answer_status(), found(["a", "b", "c"]), found(texts))
    assert ([view.id for view in page], page.next_cursor) == (["a", "b"], "0-2")
    rest = answer_status(), found(["c"]), found(texts[2:]), found([])
    requests, page = drive(holds(context, "tokens", 2, page.next_cursor), *rest)
    assert requests[1].args[2] == 2, "the offset in the index"
    assert ([view.id for view in page], page.next_cursor) == (["c"], None)


def test_a_list_of_holds_reads_the_index_in_parts_of_1000_ids(context):
    ids, other = [f"h{number}" for number in range(1000)], hold_record(context, agent=1).render()
    last = hold_record(context, tokens=1).render()
    replies = answer_status(), found(ids), found([other] * 1000), found(["last"]), found([last]), found([])
    requests, page = drive(holds(context, "tokens", 10, None), *replies)
    assert [request.args[2] for request in (requests[1], requests[3])] == [0, 1000]
    assert [view.id for view in page] == ["last"]


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": 1001}, {"cursor": "next"}, {"cursor": "2-0"}])
def test_a_page_with_an_invalid_size_or_cursor_is_refused_before_anything_is_sent(context, options):
    flow = holds(context, "tokens", options.get("limit", 10), options.get("cursor"))
    assert drive(flow, raises=InvalidArgument).requests == []


# -- ledgers -----------------------------------------------------------------------------------------------------------


def page_of(*entries: str, first: int = 1, trimmed: int = 0):
    """The store's reply: the number of the first entry, and the entries, oldest first."""
    return found(trimmed, first, [f"{NOW_MS}000 {entry} - - -" for entry in entries])


def test_a_ledger_page_shows_the_current_window_by_default_with_the_newest_entry_first(context):
    entries = page_of("5 commit a", "7 record b")
    requests, page = drive(ledger(context, "tokens", None, 10, None), answer_status(), entries)
    assert requests[1].keys[-1] == context.state.current_window("tokens").ledger_key
    assert [(entry.entry_id, entry.hold_id, entry.amount) for entry in page] == [("2", "b", 7), ("1", "a", 5)]
    assert page.next_cursor is None


def test_the_ledger_is_read_without_a_status_if_the_caller_names_the_window(context):
    [request], _ = drive(ledger(context, "tokens", "2025-11-30", 10, None), page_of())
    assert ":2025-11-30~" in request.keys[-1]
    drive(ledger(context, "tokens", "2025-W48", 10, None), raises=InvalidArgument)


@pytest.mark.parametrize(
    ("first", "kind", "cursor"),
    [(4, "5 commit a", "4"), (1, "5 commit a", None), (4, "99 carried 3", None)],
    ids=["more entries", "the first entry", "a summary of trimmed entries"],
)
def test_a_ledger_page_has_a_cursor_at_its_oldest_entry_only_if_older_entries_exist(context, first, kind, cursor):
    _, page = drive(
        ledger(context, "tokens", "2025-12-01", 2, "6"), page_of(kind, "7 record b", first=first, trimmed=1)
    )
    assert page.next_cursor == cursor
    assert page.trimmed
