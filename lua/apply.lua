-- apply.lua: the last part. Decides the batch in order, then writes the sums and indexes once.
--
-- returns one string, a line per item:
--   now_us flags acknowledged epoch due due…     flags: L the store has gone back in time, - nothing
--                                                epoch is - unless it differs from the known one
--                                                due: ids of holds past their deadline, at most 32
--   one reply for each operation, in order

local meta = call('HMGET', KEYS[1], 'epoch', 'schema', 'r:' .. replica)
if meta[2] and meta[2] ~= '1' then
  return redis.error_reply('KTRDRSCHEMA the store holds data of schema ' .. meta[2] .. ', this client knows 1')
end
local epoch, writes = meta[1] or '-', tonumber(match(meta[3] or '0', '^%d+'))
local went_back = (known_epoch ~= '-' and known_epoch ~= epoch) or tonumber(acked) > writes

local lines = { '' }
for i = first_hold + 1, #KEYS do
  local kind, fields = match(ARGV[1 + n_windows + i - first_hold], '^(%a) (.*)$')
  lines[#lines + 1] = operations[kind](fields, KEYS[i])
end

for i = 1, n_windows do
  local w = windows[i]
  if w.creating or w.changing or next(w.delta) then
    dirty = true
    store_window(w)
  end
end
store_due()
store_unconfirmed()

-- Replicas that were not heard of for two days are forgotten, lest short-lived processes fill the hash.
local function forget_replicas()
  local all, now_s = call('HGETALL', KEYS[1]), floor(now_ms / 1000)
  for i = 1, #all, 2 do
    local seen = match(all[i], '^r:') and match(all[i + 1], ' (%d+)$')
    if seen and now_s - tonumber(seen) > 172800 then call('HDEL', KEYS[1], all[i]) end
  end
end

if dirty then
  if epoch == '-' then
    epoch = proposed_epoch
    call('HSET', KEYS[1], 'epoch', epoch, 'schema', '1')
  end
  if writes == 0 and call('HLEN', KEYS[1]) > 1024 then forget_replicas() end
  writes = writes + 1
  call('HSET', KEYS[1], 'r:' .. replica, text(writes) .. ' ' .. time[1])
end

local due = call('ZRANGEBYSCORE', KEYS[3], '-inf', text(now_ms), 'LIMIT', 0, DUE_AT_MOST)
lines[1] = now_us_text .. ' ' .. (went_back and 'L' or '-') .. ' ' .. text(writes) .. ' '
  .. (epoch ~= known_epoch and epoch or '-') .. (#due > 0 and ' ' .. table.concat(due, ' ') or '')
return table.concat(lines, '\n')
