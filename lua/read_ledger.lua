-- read_ledger.lua: reads a page of a ledger, newest entry first. Writes nothing.
--
-- KEYS     1 meta   2 the ledger (list)
-- ARGV     1 replica   2 number of the entry before which the page begins; '' for the newest   3 entries at most
-- returns  { head, trimmed, number, { entry… } }; head as in read_head.lua
--          trimmed is 1 if entries before that number were trimmed, so that the page begins with the newest again
--          number is that of the page's oldest entry; of a summary, that of the newest entry in it (ledger.lua)
--          entries are in the order of the list, oldest first

local length = redis.call('LLEN', KEYS[2])
local trimmed_count = string.match(redis.call('LINDEX', KEYS[2], 0) or '', '^%d+ %-?%d+ carried (%d+) ')
local first = trimmed_count and trimmed_count + 0 or 1 -- number at index 0; that of its last entry for a summary
local next_number = first + length
local before, trimmed = tonumber(ARGV[2]) or next_number, 0
if before > next_number or (trimmed_count and before <= first) then before, trimmed = next_number, 1 end
local start = math.max(0, before - first - ARGV[3])
local entries = before > first and redis.call('LRANGE', KEYS[2], start, before - first - 1) or {}
return { head, trimmed, first + start, entries }
