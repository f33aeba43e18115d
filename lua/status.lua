-- status.lua: read windows, the due holds and the time that belongs to them. Writes nothing.
--
-- KEYS     1 meta (hash)   2 limits (hash)   3 due (zset)   4 budgets (hash)   then the hash of each window
-- ARGV     1 replica   then for each window its budget, then for each window budget:window
-- returns  { head, { due id… at most 32 }, window… }    head as in read_head.lua; a window is either
--          { run-time limit, registered definition, limit, spent, held, unconfirmed, events, overruns, asserted }, where
--          '' stands for a missing value, or one text: the reason why that window cannot be read although others can
-- error    the same reason, if only one window was requested: the client retries TRYAGAIN

local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now_ms), 'LIMIT', 0, 32)
local reply = { head, due }

local function read_window(key, budget, name)
  local stored = redis.pcall('HMGET', key, 'def', 'limit', 'spent', 'held', 'unconfirmed', 'events', 'overruns',
    'asserted')
  if stored.err then return stored.err end
  local registered, last_window = unpack(redis.call('HMGET', KEYS[4], 'd:' .. budget, 'w:' .. budget))
  -- A missing window must not read as a budget without spend (see prelude.lua).
  if not stored[1] and last_window and budget .. ':' .. last_window == name then
    return 'TRYAGAIN a window of ' .. budget .. ' was begun and is not here: its slot is half moved, or it was deleted'
  end
  local window = { redis.call('HGET', KEYS[2], budget) or '', registered or '' }
  for i = 2, 8 do window[i + 1] = stored[i] or '' end
  return window
end

local n_windows = #KEYS - 4
for i = 1, n_windows do
  local window = read_window(KEYS[4 + i], ARGV[1 + i], ARGV[1 + n_windows + i])
  if n_windows == 1 and type(window) == 'string' then return redis.error_reply(window) end
  reply[#reply + 1] = window
end
return reply
