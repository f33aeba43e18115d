-- limits.lua: sets or clears a limit at run time, for all replicas.
--
-- KEYS   1 limits (hash; per budget limit, until_ms, and when it was set, in µs)   2 meta (hash; its field `limits` tells
--        whether there are any)   3 budgets (hash)
-- ARGV   1 budget   2 limit in units, '-' for uncapped, '' to clear   3 until_ms, 0 for good   4 the budget's definition,
--        which this registers if none is: a limit is an amount of its unit
-- returns the store's time in microseconds; or 'm definition' if another one is registered, and nothing was changed
--
-- What has ended is removed on the way, some at a time.

local time = redis.call('TIME')
local now_ms, now_us = time[1] * 1000 + math.floor(time[2] / 1000), time[1] .. string.format('%06d', time[2])
local registered = redis.call('HGET', KEYS[3], 'd:' .. ARGV[1])
if registered and registered ~= ARGV[4] then return 'm ' .. registered end
local all = redis.call('HRANDFIELD', KEYS[1], 16, 'WITHVALUES')
for i = 1, #all, 2 do
  local until_ms = tonumber(string.match(all[i + 1], ' (%d+)'))
  if until_ms > 0 and until_ms <= now_ms then redis.call('HDEL', KEYS[1], all[i]) end
end
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[3], 'd:' .. ARGV[1], ARGV[4])
  -- Ten years, until the first window of a budget decides (apply.lua).
  if redis.call('PTTL', KEYS[3]) == -1 then redis.call('PEXPIRE', KEYS[3], '315360000000') end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. now_us)
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[2], 'limits', '1')
else
  redis.call('HDEL', KEYS[2], 'limits')
end
return now_us
