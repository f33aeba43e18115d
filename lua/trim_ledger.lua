-- trim_ledger.lua (part): replaces the oldest entries of a ledger, 2,048 at most, by one summary. It is included where a
-- ledger has grown: a function would cost time at each call. Uses the locals key (of the window), ledger_key, length and
-- length_max. docs/wire.md describes entries and their numbers.

local n_trimmed = math.min(2048, length - (length_max - length_max % 2) / 2)
local oldest = call('LRANGE', ledger_key, 0, n_trimmed - 1)
local units, count = match(oldest[1], '^%d+ (%-?%d+) carried (%d+) ')
local first, sum = units and 2 or 1, 0
-- The sum may exceed 2^53, so the store adds it up, in a field of the window that exists during this step only.
call('HSET', key, 'carried', units or '0')
for i = first, n_trimmed do
  local added = (match(oldest[i], '^%d+ (%-?%d+) ') or 0) + 0
  if sum + added >= 9007199254740992 or sum + added <= -9007199254740992 then -- 2^53
    call('HINCRBY', key, 'carried', text(sum))
    sum = 0
  end
  sum = sum + added
end
call('HINCRBY', key, 'carried', text(sum))
units, count = call('HGET', key, 'carried'), text((count or 0) + n_trimmed - first + 1)
call('HDEL', key, 'carried')
call('LTRIM', ledger_key, n_trimmed, -1)
call('LPUSH', ledger_key, now_us_text .. ' ' .. units .. ' carried ' .. count .. ' - - -')
