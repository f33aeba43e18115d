-- migrate.lua: replaces the registered definition of a budget.
--
-- The fast path does not read the registered definition: it admits only in a window in which a limit is asserted. That
-- assertion is removed from the current window of the replaced definition, so that each replica obeys with its next call.
-- Holds that are open are settled in their windows as ever.
--
-- KEYS   1 meta (hash)   2 limits (hash)   3 budgets (hash)   4 the current window of the registered definition (hash)
-- ARGV   1 budget   2 the registered definition, as the client has read it; '' for none   3 the new one
--        4 and 5 from when until when that window is the current one, in ms; 5 is 0 for ever
--        6 1 if the limit that was set at run time goes, too: it is an amount of another unit
-- returns done; cleared if a limit that was set at run time went; or w if that window, or that definition, is not the current one any more: nothing was changed

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and epoch:sub(1, 2) ~= '3.' then
  return redis.error_reply('KTRDRSCHEMA the store holds data of another schema than 3, which this version reads: '
    .. 'use another tenant (KTRDR_TENANT), or empty the store')
end
local field = 'd:' .. ARGV[1]
if (redis.call('HGET', KEYS[3], field) or '') ~= ARGV[2] then return 'w' end
if now_ms < ARGV[4] + 0 or (ARGV[5] ~= '0' and now_ms >= ARGV[5] + 0) then return 'w' end
redis.call('HDEL', KEYS[4], 'asserted')
redis.call('HSET', KEYS[3], field, ARGV[3])
-- Ten years, until the first window of a budget decides (apply.lua).
if redis.call('PTTL', KEYS[3]) == -1 then redis.call('PEXPIRE', KEYS[3], '315360000000') end
return ARGV[6] == '1' and redis.call('HDEL', KEYS[2], ARGV[1]) == 1 and 'cleared' or 'done'
