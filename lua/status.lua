-- status.lua: reads windows and the time that belongs to them. Writes nothing.
--
-- KEYS     1 meta   2 limits   3 due   then a window's hash each
-- ARGV     1 replica   then a budget's name for each window, then for each 'expires_ms budget:window'
-- returns  { head, { due id… at most 32 }, window… }; head as in read_head.lua, a window being
--          { run-time limit or '', registered definition, limit, spent, held, unconfirmed, events, overruns, asserted }
--          with '' for what is not there; or one line that says why that window cannot be read, though others can. If it is
--          the only one that is asked for, that is an error, which a client knows to retry

local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now_ms), 'LIMIT', 0, 32)
local reply = { head, due }

local function read(key, budget, window_name)
  local stored = redis.pcall('HMGET', key, 'def', 'limit', 'spent', 'held', 'unconfirmed', 'events', 'overruns',
    'asserted')
  if stored.err then return stored.err end
  local definition = redis.call('HGET', KEYS[1], 'd:' .. budget) or ''
  -- Begun, and not here: a slot that is half moved must not show as a budget that nobody has spent (see admission.lua).
  local last = not stored[1] and redis.call('HGET', KEYS[1], 'b:' .. budget)
  local expires_ms = last == window_name and tonumber(string.match(last, '^%d+'))
  if expires_ms and (expires_ms == 0 or expires_ms / 1000 > time[1] + 0) then
    return 'TRYAGAIN a window of ' .. budget .. ' was begun and is not here: its slot is half moved, or it was deleted'
  end
  local window = { redis.call('HGET', KEYS[2], budget) or '', definition }
  for i = 2, 8 do window[i + 1] = stored[i] or '' end
  return window
end

local n_windows = #KEYS - 3
for i = 1, n_windows do
  local window = read(KEYS[3 + i], ARGV[1 + i], ARGV[1 + n_windows + i])
  if n_windows == 1 and type(window) == 'string' then return redis.error_reply(window) end
  reply[#reply + 1] = window
end
return reply
