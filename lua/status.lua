-- status.lua: reads windows and the time that belongs to them. Writes nothing.
--
-- KEYS   1 meta   2 limits   3 due   then a window's hash each
-- ARGV   a budget's name for each window, then expires_ms for each
-- returns { now_us, '<epoch> <recovering_until_ms>', { due id… at most 32 }, window… }, a window being
--         { run-time limit or '', def, limit, spent, held, unconfirmed, events, overruns, asserted_us } with '' for what
--         is not there

local time = redis.call('TIME')
local now_us = string.format('%.0f', time[1] * 1000000 + time[2])
local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)),
  'LIMIT', 0, 32)
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'recovering_until')
-- At most as long as prelude.lua sets it: it may have been said before the clock was set back.
local recovering_until = math.min(tonumber(meta[2] or '0'), time[1] * 1000 + math.floor(time[2] / 1000) + 3000)
local reply = { now_us, (meta[1] or '') .. ' ' .. string.format('%.0f', recovering_until), due }
for i = 1, #ARGV / 2 do
  local stored = redis.call('HMGET', KEYS[3 + i], 'def', 'limit', 'spent', 'held', 'unconfirmed', 'events', 'overruns',
    'asserted_us')
  -- Begun, and not here: a slot that is half moved must not show as a budget that nobody has spent (see admission.lua).
  local last = not stored[1] and redis.call('HGET', KEYS[1], 'b:' .. ARGV[i])
  if last and last == ARGV[#ARGV / 2 + i] and (last == '0' or last / 1000 > time[1] + 0) then
    return redis.error_reply('TRYAGAIN a window of ' .. ARGV[i] .. ' was begun and is not here: its slot is half moved, or '
      .. 'it was deleted')
  end
  local window = { redis.call('HGET', KEYS[2], ARGV[i]) or '' }
  for j = 1, 8 do window[j + 1] = stored[j] or '' end
  reply[#reply + 1] = window
end
return reply
