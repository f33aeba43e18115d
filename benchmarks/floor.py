"""The floor of a lifecycle: the server time of the bare commands that a reservation and its commit need.

One script has the commands of the reservation, another script those of the commit. The scripts decide nothing.
"""

from __future__ import annotations

import itertools
from typing import Any

__all__ = ["Floor"]

_PREFIX = "ktrdr:{floor}:"
_REPLICA = "0123456789ab"
_BOTH = """
redis.call('TIME')
redis.call('HMGET', KEYS[1], 'epoch', ARGV[1], 'recovering_until', 'limits')
for i = 3, #KEYS - 1, 2 do
  redis.call('HMGET', KEYS[i], 'def', 'spent', 'held', 'unconfirmed', 'asserted', 'limit')
end
"""
_RESERVE = f"""{_BOTH}
redis.call('SET', KEYS[#KEYS], ARGV[3], 'NX', 'PXAT', '9999999999999')
for i = 3, #KEYS - 1, 2 do redis.call('HINCRBY', KEYS[i], 'held', '1500000') end
redis.call('ZADD', KEYS[2], '1796089953473', ARGV[2])
redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
return 'g'
"""
_COMMIT = f"""{_BOTH}
redis.call('GET', KEYS[#KEYS])
redis.call('SET', KEYS[#KEYS], ARGV[3], 'PX', '86400000')
for i = 3, #KEYS - 1, 2 do
  redis.call('RPUSH', KEYS[i + 1], ARGV[4])
  redis.call('HINCRBY', KEYS[i], 'held', '-1500000')
  redis.call('HINCRBY', KEYS[i], 'spent', '1200000')
  redis.call('HINCRBY', KEYS[i], ARGV[1], '1200000')
  redis.call('HINCRBY', KEYS[i], 'events', '1')
end
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
return 'k'
"""
_WINDOW = {"def": "usd,day,UTC,spend", "limit": "5000000000000000", "asserted": f"1796089953473767 {_REPLICA}"}
_EPOCH = f"3.{_REPLICA}0123456789abcdef"


class Floor:
    """Runs bare lifecycles. Their keys belong to a separate tenant.

    Args:
        client: a client of redis-py.
        n_budgets: the number of budgets in each reservation.
    """

    def __init__(self, client: Any, n_budgets: int) -> None:
        self._client = client
        self._scripts = [client.script_load(source) for source in (_RESERVE, _COMMIT)]
        names = [f"b{number}:2026-12-01~ays7qj" for number in range(n_budgets)]
        self._window_keys = [f"{_PREFIX}{kind}:{name}" for name in names for kind in ("w", "l")]
        self._segments = "".join(f"|u,{name},,1500000,," for name in names)
        self._serial = itertools.count(1000)
        client.hset(f"{_PREFIX}meta", mapping={"epoch": _EPOCH})
        for key in self._window_keys[::2]:
            client.hset(key, mapping=_WINDOW)

    def run(self, lifecycles: int) -> None:
        """Run bare lifecycles, one after another."""
        for number in itertools.islice(self._serial, lifecycles):
            hold_id = f"{_REPLICA}-{number}"
            keys = [f"{_PREFIX}meta", f"{_PREFIX}due", *self._window_keys, f"{_PREFIX}h:{hold_id}"]
            record = f"o c 1796090854473 1796089953473767 0 - - -{self._segments}"
            entry = f"1796089953473767 1200000 commit {hold_id} - - -"
            for script in self._scripts:
                self._client.evalsha(script, len(keys), *keys, f"r:{_REPLICA}", hold_id, record, entry)
