"""URLs of stores: valid URLs are parsed, invalid URLs are refused, and no message contains a secret."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.engine.stores import store_for
from ktrdr_budget.engine.transport.failover import FailoverStore
from ktrdr_budget.engine.transport.urls import mask_url, parse_url
from ktrdr_budget.errors import InvalidArgument

SHOWN = {
    "redis://store": "redis://store",
    "redis://": "redis://",
    "redis://:se%40cret@store:6380/2?ssl": None,
    "redis://me:se%40cret@store:6380/2?client_name=me": "redis://me:***@store:6380/2",
    "REDISS://me:secret@store/?ssl_cert_reqs=none&ssl_password=secret": "rediss://me:***@store/",
    "unix://me:secret@/run/redis.sock?db=1&password=secret": "unix://me:***@/run/redis.sock",
    "unix:///tmp/a%20b@c,d/s": "unix:///tmp/a%20b@c,d/s",
    "redis+cluster://me:secret@a:7000,b:7001,[::1]:7002": "redis+cluster://me:***@a:7000,b:7001,[::1]:7002",
    "rediss+sentinel://:secret@a:1,b/budgets/3?sentinel_username=me&sentinel_password=secret": (
        "rediss+sentinel://:***@a:1,b/budgets/3"
    ),
}


@pytest.mark.parametrize(("url", "shown"), SHOWN.items())
def test_a_url_is_shown_without_passwords_or_options(url, shown):
    if shown is None:
        with pytest.raises(InvalidArgument):
            parse_url(url)
    else:
        assert mask_url(url) == parse_url(url).shown == shown
        assert repr(parse_url(url)) == f"<StoreUrl {shown}>"
    assert "secret" not in mask_url(url)


WRONG = {
    "http://store": "it must start with one of redis://",
    "store:6379": "it must start with one of redis://",
    "redis+cluster:store": "it must start with one of redis://",
    "redis://store:0": "a port must be a number from 1 to 65535",
    "redis://store:65536": "a port must be a number from 1 to 65535",
    "redis://store:": "a port must be a number from 1 to 65535",
    "redis://store:6379x": "a port must be a number from 1 to 65535",
    "redis+cluster://a:7000,b:99999": "a port must be a number from 1 to 65535",
    "redis+cluster://a:7000,,b:7001": "a host must be a name or an address",
    "redis+cluster://": "a host must be a name or an address",
    "redis+sentinel://a:1,:2/budgets": "a host must be a name or an address",
    "redis://::1": "a host must be a name or an address",
    "redis://a,b": "several hosts need redis+cluster:// or redis+sentinel://",
    "redis://a:1,b:2/0": "several hosts need redis+cluster:// or redis+sentinel://",
    "redis+sentinel://a:26379": "the name of the service that the sentinels monitor is missing",
    "redis+sentinel://a:26379/": "the name of the service that the sentinels monitor is missing",
    "redis+sentinel://a:26379//0": "the name of the service that the sentinels monitor is missing",
    "redis+sentinel://a:26379/budgets/x": "after the '/' must be a number",
    "redis://store/x": "after the '/' must be a number",
    "redis+cluster://store/1": "a cluster has only database 0",
    "redis+cluster://store?db=1": "a cluster has only database 0",
    "unix://": "the path of a socket",
    "unix://store/run/s": "takes a path and no host",
    "redis://store?ssl_ca_certs=ca.pem": "option 'ssl_ca_certs' needs rediss://",
    "rediss://store?ssl_cert_reqs=maybe": "the value of option 'ssl_cert_reqs' is invalid",
    "rediss://store?ssl_chain=x": "option 'ssl_chain' is unknown",
    "rediss://store?db=1&db=2": "option 'db' is given twice",
    "redis://store?socket_connect_timeout=soon": "the value of option 'socket_connect_timeout' is invalid",
    "redis://store?sentinel_password=secret": "option 'sentinel_password' needs redis+sentinel://",
    "redis+sentinel://a/s?sentinel_username=me": "option 'sentinel_username' needs 'sentinel_password'",
    # A password with a reserved character: the part of the URL that it ends up in is not shown.
    "redis://me:secret/word@store:6379/0": "a port must be a number",
    "redis://me:12/secret@store": "must be percent-encoded",
    "redis://me:secret?word@store": "a port must be a number",
    "redis://secret?word@store": "an option is unknown",
    "redis://me:secret#word@store": "must be percent-encoded",
    "redis://me:secret word@store": "must be percent-encoded",
    "redis://me:secret\u00e9@store": "must be percent-encoded",
    "redis://me:secret@word@store:x": "a port must be a number",
    "redis://[secret": "a host must be a name",
    "redis://secret]": "a host must be a name",
}


@pytest.mark.parametrize(("url", "words"), WRONG.items())
def test_an_invalid_url_is_refused_without_showing_its_secrets(url, words):
    with pytest.raises(InvalidArgument) as refused:
        AsyncBudgetLimiter(url, [Budget("agent", "1")])
    assert str(refused.value).startswith("invalid store URL: ")
    assert words in str(refused.value)
    assert (
        "secret" not in f"{refused.value!r} {refused.value.__cause__!r} {refused.value.__context__!r} {mask_url(url)}"
    )


@pytest.mark.parametrize("url", [None, 1, b"redis://store", ""])
def test_an_empty_url_and_a_url_that_is_not_a_string_are_refused(url):
    with pytest.raises(InvalidArgument):
        parse_url(url)


def test_hosts_without_a_port_have_the_default_port_of_the_scheme():
    assert parse_url("redis://").hosts == (("localhost", 6379),)
    assert parse_url("redis+cluster://a,b:1").hosts == (("a", 6379), ("b", 1))
    assert parse_url("redis+sentinel://a,[fe80::1%25eth0]:1/s").hosts == (("a", 26379), ("fe80::1%eth0", 1))
    assert parse_url("unix:///run/s").hosts == ()


def test_servers_get_the_login_of_the_url_and_sentinels_get_the_sentinel_login():
    url = parse_url(
        "rediss+sentinel://me:p%40ss@a:1,b:2/budgets/3"
        "?ssl_ca_certs=/etc/ca.pem&client_name=me&sentinel_username=us%2Fer&sentinel_password=p%26w%3D"
    )
    assert (url.kind, url.tls, url.service) == ("sentinel", True, "budgets")
    assert url.at(("c", 4)) == "rediss://me:p%40ss@c:4?db=3&ssl_ca_certs=%2Fetc%2Fca.pem&client_name=me"
    assert url.sentinel_at(("a", 1)) == "rediss://us%2Fer:p%26w%3D@a:1?ssl_ca_certs=%2Fetc%2Fca.pem"
    cluster = parse_url("redis+cluster://:secret@a:1?socket_connect_timeout=2")
    assert cluster.at(("::1", 4), socket_connect_timeout="1") == "redis://:secret@[::1]:4?socket_connect_timeout=2"


async def test_connections_use_the_login_and_the_options_of_the_url():
    url = "rediss+cluster://me:p%2Fw@a:1?ssl_ca_certs=/etc/ca.pem&ssl_cert_reqs=none&ssl_check_hostname=no"
    store = store_for(url, None, "ktrdr:{default}:meta")
    assert isinstance(store, FailoverStore)
    server = store.node_at(("c", 4))
    made = server.client.connection_pool.connection_kwargs
    assert (made["host"], made["port"], made["username"], made["password"]) == ("c", 4, "me", "p/w")
    assert (made["ssl_ca_certs"], made["ssl_cert_reqs"], made["ssl_check_hostname"]) == ("/etc/ca.pem", "none", False)
    assert made["socket_connect_timeout"] == 0.5
    await server.close()


def test_importing_the_transport_does_not_import_redis_py():
    code = "import sys, ktrdr_budget.engine.stores; sys.exit(bool({'hiredis', 'redis'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
