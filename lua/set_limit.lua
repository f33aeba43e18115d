-- set_limit.lua: set or clear a limit at run time, for all replicas.
--
-- KEYS   1 limits (hash: per budget limit, until_ms, and the time it was set, in µs)   2 meta (hash: the field `limits`
--        exists while there are such limits)   3 budgets (hash)   4 the log of changes (list)
-- ARGV   1 budget   2 limit in units; '-' for uncapped, '' to clear   3 until_ms; 0 for good   4 the budget's definition,
--        which is registered if none is, since a limit is an amount of its unit   5 who changes it, and   6 why, as words
-- returns the store's time in µs; or 'm definition': another definition is registered, nothing was changed
--
-- Removes limits that have ended, a few at a time. Logs the limit before and after as `limit,until_ms,unit`, unless both
-- are the same.

local time = redis.call('TIME')
local now_ms, now_us = time[1] * 1000 + math.floor(time[2] / 1000), time[1] .. string.format('%06d', time[2])
local registered = redis.call('HGET', KEYS[3], 'd:' .. ARGV[1])
if registered and registered ~= ARGV[4] then return 'm ' .. registered end

local unit, before = string.match(ARGV[4], '^[^,]+'), '-'
local after = ARGV[2] == '' and '-' or ARGV[2] .. ',' .. ARGV[3] .. ',' .. unit
local limit, ends_ms = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%S+) (%d+)')
if limit and (ends_ms == '0' or ends_ms + 0 > now_ms) then before = limit .. ',' .. ends_ms .. ',' .. unit end
if before ~= after then log_change(KEYS[4], 'limit', ARGV[1], ARGV[5], before, after, ARGV[6]) end

local sample = redis.call('HRANDFIELD', KEYS[1], 16, 'WITHVALUES') or {} -- fakeredis: nil if the key is missing
for i = 1, #sample, 2 do
  local until_ms = tonumber(string.match(sample[i + 1], ' (%d+)'))
  if until_ms > 0 and until_ms <= now_ms then redis.call('HDEL', KEYS[1], sample[i]) end
end
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[3], 'd:' .. ARGV[1], ARGV[4])
  -- Ten years, until the first window of a budget decides (finish.lua).
  if redis.call('PTTL', KEYS[3]) == -1 then redis.call('PEXPIRE', KEYS[3], '315360000000') end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. now_us)
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[2], 'limits', '1')
else
  redis.call('HDEL', KEYS[2], 'limits')
end
return now_us
