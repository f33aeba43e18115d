-- apply.lua: the last part. Decides the batch in order, then writes the sums and indexes once.
--
-- returns one string, a line per item:
--   now_us flags acknowledged epoch due due…     flags: L the store has gone back in time, - nothing
--                                                epoch is - unless it differs from the known one
--                                                due: ids of holds past their deadline, at most 32; looked for after a
--                                                denial, and else once a second for each replica
--   one reply for each operation, in order

local lines, n_fixed = {}, 6 + 2 * n_windows - first_hold
for i = first_hold + 1, #KEYS do
  local op = ARGV[n_fixed + i]
  lines[i - first_hold + 1] = operations[op:sub(1, 1)](op, KEYS[i])
end

-- Folds the oldest entries into one that carries their sum, so that an endless window's ledger stays bounded.
local function carry_forward(w)
  if call('XLEN', w.ledger) <= tonumber(match(ARGV[6], '(%d+)$')) then return end
  local oldest, sum, ids = call('XRANGE', w.ledger, '-', '+', 'COUNT', 2048), 0, {}
  for i = 1, #oldest do
    sum = sum + tonumber(oldest[i][2][6])
    ids[i] = oldest[i][1]
  end
  call('XDEL', w.ledger, unpack(ids))
  call('XADD', w.ledger, '*', 'k', 'carried', 'i', '-', 'a', text(sum), 'o', '-', 't', '-')
end

for i = 1, n_windows do
  local w = windows[i]
  local delta, creates = w.delta, w.creating and not w.exists
  if creates then
    dirty = true
    call('HSET', w.key, 'def', w.definition, 'start_ms', w.start_ms, 'end_ms', w.end_ms)
  end
  if w.asserting and (w.creating or w.changing) then
    dirty = true
    call('HSET', w.key, 'limit', w.configured, 'asserted_us', w.asserted_us)
  end
  local sums = { delta.held, delta.spent, delta.unconfirmed, delta.overruns, delta.mine }
  for j = 1, 5 do
    local change = sums[j]
    if change and change ~= 0 then
      local field = j == 1 and 'held' or j == 2 and 'spent' or j == 3 and 'unconfirmed' or j == 4 and 'overruns'
        or 'r:' .. ARGV[1]
      call('HINCRBY', w.key, field, text(change))
    end
  end
  local first_entry = false
  if delta.events then
    local events = call('HINCRBY', w.key, 'events', text(delta.events))
    first_entry = events == delta.events
    if events % 1024 < delta.events then carry_forward(w) end
  end
  if creates or first_entry then
    local expires_ms = match(w.about, '^%a %S+ %d+ %d+ (%d+)')
    if expires_ms ~= '0' then
      call('PEXPIREAT', w.key, expires_ms)
      call('PEXPIREAT', w.ledger, expires_ms)
    end
  end
end
if due_ids[1] then store_due() end

-- The index of unconfirmed holds is kept by the expiry of their records: what nobody resolved leaves with them.
if unconfirmed_changes then
  for id, key in pairs(unconfirmed_changes) do
    if key then
      call('ZADD', KEYS[4], text(now_ms + call('PTTL', key)), id)
    else
      call('ZREM', KEYS[4], id)
    end
  end
  call('ZREMRANGEBYSCORE', KEYS[4], '-inf', text(now_ms))
end

local epoch, acknowledged, seen_s = meta[1] or '-', '0', nil
if meta[3] then acknowledged, seen_s = match(meta[3], '^(%d+) (%d+)') end
local flags = '-'
if (ARGV[2] ~= '-' and ARGV[2] ~= epoch) or tonumber(ARGV[3]) > tonumber(acknowledged) then flags = 'L' end

-- Replicas that were not heard of for two days are forgotten, lest short-lived processes fill the hash.
local function forget_replicas()
  local all = call('HGETALL', KEYS[1])
  for i = 1, #all, 2 do
    local seen = match(all[i], '^r:') and match(all[i + 1], ' (%d+)$')
    if seen and time[1] - tonumber(seen) > 172800 then call('HDEL', KEYS[1], all[i]) end
  end
end

if dirty then
  if epoch == '-' then
    epoch = match(ARGV[6], '^%S+')
    call('HSET', KEYS[1], 'epoch', epoch, 'schema', '1')
  end
  if acknowledged == '0' and call('HLEN', KEYS[1]) > 1024 then forget_replicas() end
  acknowledged = text(acknowledged + 1)
  call('HSET', KEYS[1], 'r:' .. ARGV[1], acknowledged .. ' ' .. time[1])
end

local head = now_us_text .. ' ' .. flags .. ' ' .. acknowledged .. ' ' .. (epoch ~= ARGV[2] and epoch or '-')
if denied_any or seen_s ~= time[1] then
  local due = call('ZRANGEBYSCORE', KEYS[3], '-inf', text(now_ms), 'LIMIT', 0, 32)
  if due[1] then head = head .. ' ' .. table.concat(due, ' ') end
end
lines[1] = head
return table.concat(lines, '\n')
