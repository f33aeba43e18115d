-- status.lua: reads windows and the time that belongs to them. Writes nothing.
--
-- KEYS   1 meta   2 limits   3 due   then a window's hash each
-- ARGV   a budget's name for each window
-- returns { now_us, epoch or '', { due id… at most 32 }, window… }, a window being
--         { run-time limit or '', def, limit, spent, held, unconfirmed, events, overruns } with '' for what is not there

local time = redis.call('TIME')
local now_us = string.format('%.0f', time[1] * 1000000 + time[2])
local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)),
  'LIMIT', 0, 32)
local reply = { now_us, redis.call('HGET', KEYS[1], 'epoch') or '', due }
for i = 1, #ARGV do
  local stored = redis.call('HMGET', KEYS[3 + i], 'def', 'limit', 'spent', 'held', 'unconfirmed', 'events', 'overruns')
  local window = { redis.call('HGET', KEYS[2], ARGV[i]) or '' }
  for j = 1, 7 do window[j + 1] = stored[j] or '' end
  reply[#reply + 1] = window
end
return reply
