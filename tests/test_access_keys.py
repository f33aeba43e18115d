"""Access keys: created, found by their secret, listed and revoked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from ktrdr_budget import (
    AsyncBudgetLimiter,
    Budget,
    InvalidArgument,
    KeyConflict,
    StoreError,
    StoreUnavailable,
    UnknownKey,
)
from ktrdr_budget.access_keys import KEYS_MAX, AccessKeys, is_secret
from ktrdr_budget.engine.protocol import access_keys as protocol
from ktrdr_budget.models import AccessKey
from ktrdr_budget.testing import AsyncMemoryLimiter

from .conftest import ClockedServer
from .helpers.keyspace import dump, immortal_keys

BUDGETS = [Budget("agent", "5.00")]
PREFIX = "ktrdr:{default}:"


@pytest.fixture
def keys(limiter: AsyncBudgetLimiter) -> AccessKeys:
    return AccessKeys(limiter)


@pytest.fixture
async def clocked(clocked_server: ClockedServer) -> AsyncIterator[AsyncBudgetLimiter]:
    """A limiter with a store whose clock the test sets."""
    async with AsyncBudgetLimiter(clocked_server.url, BUDGETS) as made:
        yield made


async def names(keys: AccessKeys) -> list[str]:
    return [key.name for key in await keys.list()]


async def changes(limiter: AsyncBudgetLimiter) -> list[tuple[str, str, str, str, str]]:
    page = await limiter.changes()
    return [(each.name, each.before, each.after, each.by, each.reason) for each in reversed(page.items)]


async def test_a_key_is_found_by_its_secret_with_all_its_fields(keys):
    made = await keys.create("ci", scope={"team": "quant", "app": "a/b:c@d"}, may_set=["user", "model"], rights="read")
    assert re.fullmatch(r"ktrdr_[A-Za-z0-9_-]{43}", made.secret)
    found = await keys.find(made.secret)
    assert found == made.key
    assert (found.name, found.rights, found.expires_at) == ("ci", "read", None)
    assert (found.scope, found.may_set) == ({"app": "a/b:c@d", "team": "quant"}, ("model", "user"))


async def test_a_key_has_by_default_no_scope_and_no_end_and_the_right_to_use(keys):
    key = (await keys.create("ci")).key
    assert (key.scope, key.may_set, key.rights, key.expires_at) == ({}, (), "use", None)


async def test_every_secret_is_another_one(keys):
    assert len({(await keys.create(f"key-{number}")).secret for number in range(20)}) == 20


async def test_the_store_and_the_repr_of_a_new_key_do_not_contain_the_secret(keys, client):
    made = await keys.create("ci", reason="because")
    random = made.secret.removeprefix("ktrdr_")
    assert random not in f"{made!r} {dump(client)}"


async def test_an_unknown_secret_finds_no_key(keys):
    made = await keys.create("ci")
    for secret in ("ktrdr_" + "A" * 43, made.secret[:-1], made.secret + "A", made.secret.upper(), "ci", ""):
        assert await keys.find(secret) is None


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("ktrdr_" + "aZ0_-" * 8 + "abc", True),
        ("ktrdr_" + "a" * 42, False),
        ("ktrdr_" + "a" * 44, False),
        ("ktrdr_" + "a" * 42 + "=", False),
        ("ktrdr_" + "a" * 43 + "\n", False),
        ("other_" + "a" * 43, False),
        ("", False),
    ],
)
def test_only_a_text_of_the_form_of_a_secret_may_be_one(text, is_one):
    assert is_secret(text) is is_one


async def test_a_second_key_of_the_same_name_is_refused_and_changes_nothing(keys, client):
    made = await keys.create("ci", expires="1d")
    before = dump(client)
    with pytest.raises(KeyConflict, match="a key named 'ci' exists"):
        await keys.create("ci")
    assert dump(client) == before
    assert await keys.find(made.secret) == made.key


async def test_of_many_keys_of_one_name_that_are_created_at_once_exactly_one_is_created(keys):
    done = await asyncio.gather(*[keys.create("ci") for _ in range(10)], return_exceptions=True)
    assert [type(each) for each in done].count(KeyConflict) == 9
    assert await names(keys) == ["ci"]


async def test_names_that_are_prefixes_of_another_name_are_separate_keys(keys):
    all_names = ["a", "a-b", "a.", "a/b", "a:b", "a@", "aa", "a_", "B", "b"]
    for name in all_names:
        await keys.create(name)
    await keys.revoke("a")
    with pytest.raises(UnknownKey):
        await keys.revoke("a")
    assert await names(keys) == sorted(all_names[1:])
    await keys.create("a")
    assert await names(keys) == sorted(all_names)


# -- revocation --------------------------------------------------------------------------------------------------------


async def test_a_revoked_key_is_not_found_and_its_name_is_free(keys, other):
    made = await keys.create("ci", expires="1d")
    await AccessKeys(other).revoke("ci")
    assert await keys.find(made.secret) is None
    assert await names(keys) == []
    again = await keys.create("ci")
    assert await keys.find(made.secret) is None
    assert await keys.find(again.secret) == again.key


async def test_the_last_revocation_leaves_nothing_but_the_log(keys, client):
    await keys.create("ci", expires="1d")
    await keys.revoke("ci")
    assert [key for key in dump(client) if "key" in key.removeprefix(PREFIX)] == []


async def test_the_revocation_of_an_unknown_key_is_an_error_and_is_not_logged(limiter, keys):
    with pytest.raises(UnknownKey, match="no key is named 'ci'"):
        await keys.revoke("ci")
    assert await changes(limiter) == []


# -- expiry ------------------------------------------------------------------------------------------------------------


async def test_a_key_expires_by_the_clock_of_the_store(clocked, clocked_server):
    keys = AccessKeys(clocked)
    made = await keys.create("ci", expires="90d")
    assert made.key.expires_at - made.key.created_at == timedelta(days=90)
    assert abs(made.key.created_at - clocked_server.now()) < timedelta(minutes=1)
    clocked_server.advance(timedelta(days=90).total_seconds() - 60)
    assert await keys.find(made.secret) == made.key
    clocked_server.advance(120)
    assert await keys.find(made.secret) is None
    assert await names(keys) == []


async def test_the_name_of_an_expired_key_is_free_and_the_next_new_key_prunes_the_index(clocked, clocked_server):
    keys = AccessKeys(clocked)
    for number in range(3):
        await keys.create(f"short-{number}", expires=timedelta(hours=1))
    await keys.create("long", expires="2d")
    clocked_server.advance(7200)
    with clocked_server.client() as client:
        assert client.zcard(f"{PREFIX}keys") == 4
        await keys.create("short-1")
        assert [member.split(" ")[0] for member in client.zrange(f"{PREFIX}keys", 0, -1)] == ["long", "short-1"]
        assert [member.split(" ")[0] for member in client.zrange(f"{PREFIX}keys:ends", 0, -1)] == ["long"]
    assert await names(keys) == ["long", "short-1"]


async def test_the_record_of_a_key_with_an_end_expires_in_the_store(keys, client):
    await keys.create("short", expires="30m")
    await keys.create("long")
    lasting = [key.removeprefix(PREFIX).partition(":")[0] for key in immortal_keys(client)]
    assert sorted(lasting) == ["key", "keys", "keys"], "the record without an end, and the two indexes"


# -- pages and bounds --------------------------------------------------------------------------------------------------


async def test_the_pages_of_keys_are_sorted_by_name(keys):
    for name in ("c", "a", "e", "b", "d"):
        await keys.create(name)
    found, cursor = [], None
    while True:
        page = await keys.list(2, cursor)
        found.append([key.name for key in page])
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == [["a", "b"], ["c", "d"], ["e"]]
    assert [key.name for key in await keys.list(2, "bb")] == ["c", "d"], "the key of the cursor may be revoked"


async def test_a_tenant_has_at_most_ten_thousand_keys_that_have_not_expired(keys, client):
    client.zadd(f"{PREFIX}keys", {f"key-{number} {number:064x}": 0 for number in range(KEYS_MAX)})
    with pytest.raises(KeyConflict, match="10000 keys"):
        await keys.create("ci")
    client.zadd(f"{PREFIX}keys:ends", {f"key-{number} {number:064x}": 1 for number in range(2500)})
    made = await keys.create("ci")
    assert await keys.find(made.secret) == made.key
    assert client.zcard(f"{PREFIX}keys") == KEYS_MAX - 2500 + 1
    assert not client.exists(f"{PREFIX}keys:ends")


# -- retries, faults and the log ---------------------------------------------------------------------------------------


async def test_a_request_that_is_sent_again_after_a_lost_reply_has_the_same_result(limiter):
    wanted = AccessKey("ci", {"team": "quant"}, (), "use", (await limiter.status("agent")).as_of, None)
    digest = protocol.digest_of("secret")
    create = protocol.create_key(limiter.keys, wanted, digest, 60_000, KEYS_MAX, "ops", "")
    first, again = [await limiter.execute(create, "access key") for _ in range(2)]
    assert first == again
    assert protocol.parse_key(first.decode()).name == "ci"
    revoke = protocol.revoke_key(limiter.keys, f"ci {digest}", "ops", "")
    assert [await limiter.execute(revoke, "access key") for _ in range(2)] == [1, 0]
    assert len(await changes(limiter)) == 2


async def test_new_and_revoked_keys_are_logged_without_their_secret(limiter, keys):
    made = await keys.create(
        "ci", scope={"team": "quant"}, may_set=["user", "model"], expires="1h", by="ops", reason="a build"
    )
    await keys.create("plain", rights="admin")
    await keys.revoke("ci", by="ops", reason="leaked")
    until = made.key.expires_at.isoformat(timespec="milliseconds")[:-6].removesuffix(".000") + "Z"
    key = f"use; scope team=quant; may set model,user; until {until}"
    assert await changes(limiter) == [
        ("ci", "", key, "ops", "a build"),
        ("plain", "", "admin", "", ""),
        ("ci", key, "", "ops", "leaked"),
    ]
    assert {change.kind for change in await limiter.changes()} == {"key"}


async def test_if_the_log_cannot_be_written_no_key_is_created_or_revoked(keys, client):
    made = await keys.create("old")
    client.delete(f"{PREFIX}changes")
    client.set(f"{PREFIX}changes", "damaged")
    before = dump(client)
    with pytest.raises(StoreError):
        await keys.create("ci")
    with pytest.raises(StoreError):
        await keys.revoke("old")
    assert dump(client) == before
    assert await keys.find(made.secret) == made.key


async def test_without_the_store_no_key_is_found(own_server):
    async with AsyncBudgetLimiter(own_server.url, BUDGETS, timeout=0.3, on_store_error="allow") as limiter:
        keys = AccessKeys(limiter)
        made = await keys.create("ci")
        own_server.pause()
        with pytest.raises(StoreUnavailable):
            await keys.find(made.secret)
        own_server.resume()
        assert await keys.find(made.secret) == made.key


async def test_keys_are_not_replayed_after_a_data_loss(keys, client):
    made = await keys.create("ci")
    client.flushall()
    assert await keys.find(made.secret) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": ""},
        {"name": "two words"},
        {"name": "x" * 129},
        {"name": None},
        {"scope": {"Team": "quant"}},
        {"scope": {"team": ""}},
        {"scope": {"team": "a,b"}},
        {"scope": {"team": "x" * 97}},
        {"scope": "team=quant"},
        {"scope": {f"field{number}": "x" for number in range(17)}},
        {"may_set": "user"},
        {"may_set": ["a b"]},
        {"may_set": [7]},
        {"may_set": 7},
        {"may_set": [f"field{number}" for number in range(17)]},
        {"scope": {"team": "quant"}, "may_set": ["team"]},
        {"rights": "root"},
        {"rights": None},
        {"rights": ["admin"]},
        {"expires": ""},
        {"expires": "90"},
        {"expires": "0d"},
        {"expires": "-1d"},
        {"expires": "4000d"},
        {"expires": "999999d"},
        {"expires": timedelta()},
        {"expires": 90},
        {"by": "x" * 257},
        {"reason": "\ud800"},
    ],
    ids=repr,
)
async def test_a_key_with_an_invalid_argument_is_refused_before_a_request_is_sent(arguments):
    keys = AccessKeys(AsyncMemoryLimiter(BUDGETS))  # not started: a request would fail
    with pytest.raises(InvalidArgument) as refused:
        await keys.create(**{"name": "ci", **arguments})
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("limit", "cursor"), [(0, None), (1001, None), (True, None), (1, ""), (1, "two words"), (1, 7)]
)
async def test_an_invalid_page_of_keys_is_refused(limit, cursor):
    with pytest.raises(InvalidArgument):
        await AccessKeys(AsyncMemoryLimiter(BUDGETS)).list(limit, cursor)


async def test_a_key_is_created_and_found_and_listed_and_revoked_in_memory():
    async with AsyncMemoryLimiter(BUDGETS) as limiter:
        keys = AccessKeys(limiter)
        made = await keys.create("ci", expires="1d")
        assert await keys.find(made.secret) == made.key
        assert list(await keys.list()) == [made.key]
        await keys.revoke("ci")
        assert await keys.find(made.secret) is None
