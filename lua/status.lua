-- status.lua: reads windows and the time that belongs to them. Writes nothing.
--
-- KEYS     1 meta   2 limits   3 due   4 budgets (hash)   then a window's hash each
-- ARGV     1 replica   then a budget's name for each window, then budget:window for each
-- returns  { head, { due id… at most 32 }, window… }; head as in read_head.lua, a window being
--          { run-time limit or '', registered definition, limit, spent, held, unconfirmed, events, overruns, asserted }
--          with '' for what is not there; or one line that says why that window cannot be read, though others can. If it is
--          the only one that is asked for, that is an error, which a client knows to retry

local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now_ms), 'LIMIT', 0, 32)
local reply = { head, due }

local function read(key, budget, name)
  local stored = redis.pcall('HMGET', key, 'def', 'limit', 'spent', 'held', 'unconfirmed', 'events', 'overruns',
    'asserted')
  if stored.err then return stored.err end
  local listed = redis.call('HMGET', KEYS[4], 'd:' .. budget, 'w:' .. budget)
  -- Begun, and not here: a slot that is half moved must not show as a budget that nobody has spent (see prelude.lua).
  if not stored[1] and listed[2] and budget .. ':' .. listed[2] == name then
    return 'TRYAGAIN a window of ' .. budget .. ' was begun and is not here: its slot is half moved, or it was deleted'
  end
  local window = { redis.call('HGET', KEYS[2], budget) or '', listed[1] or '' }
  for i = 2, 8 do window[i + 1] = stored[i] or '' end
  return window
end

local n_windows = #KEYS - 4
for i = 1, n_windows do
  local window = read(KEYS[4 + i], ARGV[1 + i], ARGV[1 + n_windows + i])
  if n_windows == 1 and type(window) == 'string' then return redis.error_reply(window) end
  reply[#reply + 1] = window
end
return reply
