-- apply.lua: the last part. Decides the batch in order, then writes the sums and indexes once.
--
-- returns one string, a line per item:
--   now_us flags acknowledged epoch due due…     flags: L the store has gone back in time, and did nothing else; - nothing
--                                                epoch is - unless it differs from the known one
--                                                due: ids of holds past their deadline, at most 32; looked for after a
--                                                denial, and else once a second for each replica
--   one reply for each operation, in order

local lines = { '', '' }
for i = first_hold + 1, #KEYS do
  local op = ARGV[first_op + i - first_hold]
  lines[i - first_hold + 1] = operations[op:sub(1, 1)](op, KEYS[i])
end

for i = 1, n_windows do
  local w = windows[i]
  local key, at, first_entry = w.key, w.at, false
  local events, spent = w[EVENTS], w[SPENT]
  local creates = w.creating and not w.exists
  if creates or (w.creating and w.exists == '-' and ARGV[at + 1] ~= '-') then
    call('HSET', key, 'def', ARGV[at + 1], 'start_ms', ARGV[at + 2], 'end_ms', ARGV[at + 3])
    call('HSET', KEYS[1], 'b:' .. match(w.name, '^(.+):'), ARGV[at + 4] .. ' ' .. w.name)
  end
  if w.registering and not w.registered then
    dirty = true
    call('HSET', KEYS[1], 'd:' .. match(w.name, '^(.+):'), ARGV[at + 1])
  end
  if w.asserting and w.changing then
    dirty = true
    call('HSET', key, 'limit', ARGV[at + 5], 'asserted', w.claim)
  end
  if w[HELD] ~= 0 then call('HINCRBY', key, 'held', text(w[HELD])) end
  if w[UNCONFIRMED] ~= 0 then call('HINCRBY', key, 'unconfirmed', text(w[UNCONFIRMED])) end
  if w[OVERRUNS] ~= 0 then call('HINCRBY', key, 'overruns', text(w[OVERRUNS])) end
  if spent ~= 0 then
    spent = text(spent)
    call('HINCRBY', key, 'spent', spent)
    call('HINCRBY', key, 'r:' .. ARGV[1], spent)
  end
  if events ~= 0 then
    local total = call('HINCRBY', key, 'events', text(events))
    first_entry = total == events
    if total % 1024 < events then carry_forward(w.ledger, ARGV[6]) end
  end
  if (creates or first_entry) and ARGV[at + 4] ~= '0' then
    call('PEXPIREAT', key, ARGV[at + 4])
    call('PEXPIREAT', w.ledger, ARGV[at + 4])
  end
  -- A hold of several windows may outlive one of them, and must not bring it back.
  if ARGV[at + 4] ~= '0' and tonumber(ARGV[at + 4]) <= now_ms then call('DEL', key, w.ledger) end
end
if n_added > 0 or due_removed[1] then store_due() end

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

if dirty then
  if epoch == '-' then -- its first words tell the schema
    epoch = '2.' .. match(ARGV[6], '^%S+')
    call('HSET', KEYS[1], 'epoch', epoch)
  end
  acknowledged = call('HINCRBY', KEYS[1], 'r:' .. ARGV[1], 1)
  if new_second then
    call('HSET', KEYS[1], 's:' .. ARGV[1], time[1])
    local crowded = 2 * (call('ZCARD', KEYS[3]) + call('ZCARD', KEYS[4])) >= ARGV[6]:sub(-12) + 0
    if crowded and not meta[6] then call('HSET', KEYS[1], 'crowded', '1') end
    if meta[6] and not crowded then call('HDEL', KEYS[1], 'crowded') end
  end
  if not meta[3] and call('HLEN', KEYS[1]) > 2048 then
    -- Replicas that were not heard of for two days are forgotten, lest short-lived processes fill the hash; and budgets
    -- whose last window is no more.
    local all = call('HGETALL', KEYS[1])
    for i = 1, #all, 2 do
      local replica = match(all[i], '^s:(.+)')
      if replica and time[1] - all[i + 1] > 172800 then call('HDEL', KEYS[1], all[i], 'r:' .. replica) end
      local budget, expires = match(all[i], '^b:(.+)'), match(all[i + 1], '^(%d+) ')
      if budget and expires ~= '0' and expires + 0 <= now_ms then call('HDEL', KEYS[1], all[i], 'd:' .. budget) end
    end
  end
end

-- A replica that only asks is heard of, too: once an hour, whether or not there is memory to write it down.
if not dirty and acknowledged ~= '0' and meta[3] and time[1] - meta[3] > 3600 then
  redis.pcall('HSET', KEYS[1], 's:' .. ARGV[1], time[1])
end

local due = ''
if denied_any or new_second then
  local ids = call('ZRANGEBYSCORE', KEYS[3], '-inf', text(now_ms), 'LIMIT', 0, 32)
  if ids[1] then due = ' ' .. table.concat(ids, ' ') end
end
lines[1] = now_us_text .. ' - ' .. acknowledged .. ' ' .. (epoch ~= ARGV[2] and epoch or '-') .. due
return table.concat(lines, '\n')
