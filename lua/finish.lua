-- finish.lua (part): the last part of a batch. Runs the operations in order, then writes sums, ledgers and indexes once.
--
-- returns one text, a line for each item:
--   now_us flags acknowledged epoch due due…
--     flags  L: data was lost, and the batch did nothing else; else -
--     epoch  - if it is the one of the request
--     due    ids of holds past their deadline, at most 32: after a denial, else once a second for each replica
--   the reply to each operation, in order

local SILENT_S = 172800 -- two days
local LISTED_S = 3110400 -- 36 days
local REPLICAS_MAX = 2048

local function list_replica()
  call('ZADD', KEYS[7], time[1], ARGV[1])
  call('EXPIRE', KEYS[7], text(LISTED_S))
end

local lines = { '', '' }
for i = first_hold + 1, #KEYS do
  local op = ARGV[first_op + i - first_hold]
  lines[i - first_hold + 1] = operations[sub(op, 1, 1)](op, KEYS[i])
end

-- List a budget for as long as its last window lives; the lists live as long as the last of all windows. Remove some
-- budgets whose windows have expired.
local function list_budget(w, expires)
  local budget, window = match(w.name, '^(.+):(.+)$')
  if w.stale and call('ZSCORE', KEYS[6], budget) then return end
  call('HSET', KEYS[5], 'w:' .. budget, window)
  call('ZADD', KEYS[6], expires == '0' and '+inf' or expires, budget)
  local ended = call('ZRANGEBYSCORE', KEYS[6], '-inf', text(now_ms), 'LIMIT', 0, 16)
  if ended[1] then
    call('ZREM', KEYS[6], unpack(ended))
    for i = 1, #ended do call('HDEL', KEYS[5], 'w:' .. ended[i], 'd:' .. ended[i]) end
  end
  local last = call('ZREVRANGE', KEYS[6], 0, 0, 'WITHSCORES')
  local ends_ms = last[2] == 'inf' and now_ms + LASTING_MS or last[2] + 0
  for i = 5, 6 do call('PEXPIREAT', KEYS[i], text(ends_ms)) end
end

-- Fold the subtotals of replicas that were silent for two days into one. A window without end outlives most replicas, so
-- a few are folded once a second by each replica that writes.
local function fold_subtotals(key)
  local fields = call('HRANDFIELD', key, 16)
  for i = 1, #fields do
    local replica = match(fields[i], '^[rt]:(%x+)$')
    if replica and replica ~= ARGV[1] and (call('ZSCORE', KEYS[7], replica) or 0) + SILENT_S < time[1] + 0 then
      local units = match(fields[i], '^r:') and call('HGET', key, fields[i])
      if units then call('HINCRBY', key, 'r:-', units) end
      call('HDEL', key, fields[i])
    end
  end
end

local function write_window(w)
  local key, at, expires = w.key, w.at, ARGV[w.at + 4]
  local events, spent = w[EVENTS], w[SPENT]
  local creates = w.creating and not w.exists
  if creates or (w.creating and w.exists == '-' and ARGV[at + 1] ~= '-') then
    call('HSET', key, 'def', ARGV[at + 1])
    list_budget(w, expires)
  end
  if w.registering and not w.registered then
    dirty = true
    call('HSET', KEYS[5], 'd:' .. match(w.name, '^(.+):'), ARGV[at + 1])
    if call('PTTL', KEYS[5]) == -1 then call('PEXPIRE', KEYS[5], text(LASTING_MS)) end
  end
  if w.asserting and w.changing then
    dirty = true
    call('HSET', key, 'limit', ARGV[at + 5])
    -- The fast path admits in windows with an asserted limit: never in a restored one of another definition.
    if not w.conflict then call('HSET', key, 'asserted', w.claim) end
  end
  if w[HELD] ~= 0 then call('HINCRBY', key, 'held', text(w[HELD])) end
  if w[UNCONFIRMED] ~= 0 then call('HINCRBY', key, 'unconfirmed', text(w[UNCONFIRMED])) end
  if w[OVERRUNS] ~= 0 then call('HINCRBY', key, 'overruns', text(w[OVERRUNS])) end
  if spent ~= 0 then
    spent = text(spent)
    call('HINCRBY', key, 'spent', spent)
    call('HINCRBY', key, 'r:' .. ARGV[1], spent)
  end
  if events ~= 0 then call('HINCRBY', key, 'events', text(events)) end
  -- A ledger expires with its window, also one that was deleted and begins anew.
  if w.entries then
    local ledger_key = w.ledger
    local length, length_max = call('RPUSH', ledger_key, unpack(w.entries)), sub(ARGV[6], -38, -27) + 0
    if length == w.n_entries and expires ~= '0' then call('PEXPIREAT', ledger_key, expires) end
    if length > length_max then
      -- include: trim_ledger.lua
    end
  end
  if expires == '0' then
    if new_second and call('HLEN', key) > 32 then fold_subtotals(key) end
  elseif not w.exists then
    call('PEXPIREAT', key, expires)
  end
end

for i = 1, n_windows do
  -- A hold may outlive one of its windows, which then stays gone.
  if not windows[i].gone then write_window(windows[i]) end
end
if n_added > 0 or due_removed[1] then write_due() end

-- Unconfirmed holds are indexed by the expiry of their records, and leave the index with them.
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
  if epoch == '-' then
    epoch = SCHEMA .. match(ARGV[6], '^%S+')
    call('HSET', KEYS[1], 'epoch', epoch)
  end
  acknowledged = call('HINCRBY', KEYS[1], 'r:' .. ARGV[1], 1)
  if new_second then
    list_replica()
    -- The fast path counts holds only if they are many.
    local are_many = n_due + n_unconfirmed > sub(ARGV[6], -12) / 2
    if are_many and not meta[5] then
      call('HSET', KEYS[1], 'many_holds', '1')
    elseif meta[5] and not are_many then
      call('HDEL', KEYS[1], 'many_holds')
    end
    -- Among very many replicas, those that were silent for two days are forgotten, a few at a time. Among few they stay:
    -- after a jump of the store's clock, a replica that was forgotten would detect a data loss.
    local silent = call('ZCARD', KEYS[7]) > REPLICAS_MAX
      and call('ZRANGEBYSCORE', KEYS[7], '-inf', text(time[1] - SILENT_S), 'LIMIT', 0, 16) or {}
    for i = 1, #silent do
      call('ZREM', KEYS[7], silent[i])
      call('HDEL', KEYS[1], 'r:' .. silent[i])
    end
  end
end

-- A replica that only reads is listed once an hour, whether or not the store has memory left for it.
if not dirty and acknowledged ~= '0' and last_seen and time[1] - last_seen > 3600 then pcall(list_replica) end

local due = ''
if denied_any or new_second then
  local ids = call('ZRANGEBYSCORE', KEYS[3], '-inf', text(now_ms), 'LIMIT', 0, 32)
  if ids[1] then due = ' ' .. table.concat(ids, ' ') end
end
lines[1] = now_us_text .. ' - ' .. acknowledged .. ' ' .. (epoch ~= ARGV[2] and epoch or '-') .. due
return table.concat(lines, '\n')
