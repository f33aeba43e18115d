-- read_ledger.lua: read a page of a ledger, newest entry first. Writes nothing.
--
-- KEYS     1 meta (hash)   2 the ledger (list)
-- ARGV     1 replica   2 the page holds entries before this number; '' for the newest   3 entries at most
-- returns  { head, trimmed, number, { entry… } }    head as in read_head.lua
--          trimmed  1 if entries before the number given were trimmed: the page then holds the newest entries
--          number   of the page's oldest entry; of a summary, the number of the newest entry in it (docs/wire.md)
--          entries  in the order of the list, oldest first

local length = redis.call('LLEN', KEYS[2])
local count = string.match(redis.call('LINDEX', KEYS[2], 0) or '', '^%d+ %-?%d+ carried (%d+) ')
local first = count and count + 0 or 1 -- the number at index 0
local next_number = first + length
local before, trimmed = tonumber(ARGV[2]) or next_number, 0
if before > next_number or (count and before <= first) then before, trimmed = next_number, 1 end
local start = math.max(0, before - first - ARGV[3])
local entries = before > first and redis.call('LRANGE', KEYS[2], start, before - first - 1) or {}
return { head, trimmed, first + start, entries }
