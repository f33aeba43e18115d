-- migrate.lua: replace the registered definition of a budget.
--
-- The fast path does not read the registered definition: it admits only in windows in which a limit is asserted. So this
-- removes the assertion from the current window of the replaced definition, and each replica obeys with its next call.
-- Open holds are settled in their windows as before.
--
-- KEYS   1 meta (hash)   2 limits (hash)   3 budgets (hash)   4 the current window of the registered definition (hash)
-- ARGV   1 budget   2 the registered definition, as the client has read it; '' for none   3 the new definition
--        4 and 5 the start and the end of that window, in ms; the end is 0 for a window without end
--        6 1 to clear the run-time limit, too: it is an amount of another unit
-- returns done
--         cleared   done, and a run-time limit was cleared
--         w         that window, or that definition, is no longer the current one: nothing was changed

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local refused = schema_error(redis.call('HGET', KEYS[1], 'epoch'))
if refused then return refused end
local field = 'd:' .. ARGV[1]
if (redis.call('HGET', KEYS[3], field) or '') ~= ARGV[2] then return 'w' end
if now_ms < ARGV[4] + 0 or (ARGV[5] ~= '0' and now_ms >= ARGV[5] + 0) then return 'w' end
redis.call('HDEL', KEYS[4], 'asserted')
redis.call('HSET', KEYS[3], field, ARGV[3])
-- Ten years, until the first window of a budget decides (finish.lua).
if redis.call('PTTL', KEYS[3]) == -1 then redis.call('PEXPIRE', KEYS[3], '315360000000') end
return ARGV[6] == '1' and redis.call('HDEL', KEYS[2], ARGV[1]) == 1 and 'cleared' or 'done'
