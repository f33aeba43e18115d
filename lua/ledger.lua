-- ledger.lua (part): appends entries to a window's ledger and bounds its length.
--
-- A ledger is a list with the oldest entry first. An entry is one text:
--   time_us units kind id operation trace scope    units are signed; '-' stands for an empty word
-- The number of an entry is its place in the list, from 1. Trimming replaces the oldest entries by a summary, which
-- stays at the head of the list and has no number:
--   time_us units carried count - - -              the sum of entries 1 … count
-- The number of any other entry then is count plus its index: numbers never change and need no counter.

local TRIMMED_AT_ONCE = 2048

local function entry_text(units, kind, id, operation, trace)
  return now_us_text .. ' ' .. units .. ' ' .. kind .. ' ' .. id .. ' ' .. operation .. ' ' .. trace .. ' -'
end

-- Replace the oldest entries by one summary. Its sum may exceed 2^53, so the store adds it up by HINCRBY, in a field of
-- the window that exists during this step only.
local function trim(window_key, ledger_key, length, length_max)
  local n = math.min(TRIMMED_AT_ONCE, length - (length_max - length_max % 2) / 2)
  local oldest = call('LRANGE', ledger_key, 0, n - 1)
  local units, count = match(oldest[1], '^%d+ (%-?%d+) carried (%d+) ')
  local first, sum = units and 2 or 1, 0
  call('HSET', window_key, 'carried', units or '0')
  for i = first, n do
    local added = (match(oldest[i], '^%d+ (%-?%d+) ') or 0) + 0
    if sum + added >= 9007199254740992 or sum + added <= -9007199254740992 then -- 2^53
      call('HINCRBY', window_key, 'carried', text(sum))
      sum = 0
    end
    sum = sum + added
  end
  call('HINCRBY', window_key, 'carried', text(sum))
  units, count = call('HGET', window_key, 'carried'), text((count or 0) + n - first + 1)
  call('HDEL', window_key, 'carried')
  call('LTRIM', ledger_key, n, -1)
  call('LPUSH', ledger_key, entry_text(units, 'carried', count, '-', '-'))
end

-- Append entries; return whether they are the first ones of their ledger.
local function append(window_key, ledger_key, entries, n, settings)
  local length = call('RPUSH', ledger_key, unpack(entries, 1, n))
  local length_max = sub(settings, -38, -27) + 0
  if length > length_max then trim(window_key, ledger_key, length, length_max) end
  return length == n
end
