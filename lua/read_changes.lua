-- read_changes.lua: read a page of the log of changes. Writes nothing.
--
-- KEYS     1 meta (hash)   2 the log (list)
-- ARGV     1 replica   2 the page holds entries before this number; '' for the newest   3 entries at most
-- returns  { head, trimmed, more, { entry… } }    head as in read_head.lua
--          trimmed  1 if the log does not reach back to the number given, or not up to it, as after a data loss: the
--                   page then holds the newest entries
--          more     1 if older entries follow
--          entries  as in log_change.lua, the oldest first

local first = string.match(redis.call('LINDEX', KEYS[2], 0) or '', '^%d+') or 1
local next_number, trimmed = first + redis.call('LLEN', KEYS[2]), 0
local before = tonumber(ARGV[2]) or next_number
if before > next_number or (first + 0 > 1 and before <= first + 0) then before, trimmed = next_number, 1 end
local start = math.max(0, before - first - ARGV[3])
local entries = before > first + 0 and redis.call('LRANGE', KEYS[2], start, before - first - 1) or {}
return { head, trimmed, start > 0 and 1 or 0, entries }
