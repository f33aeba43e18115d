-- prelude.lua: what all parts of the write script share. The loader puts it before them, in one chunk.
--
-- KEYS  1 meta (hash)   2 limits (hash)   3 due (zset)   4 unconfirmed (zset)
--       then per window: its hash, its ledger (stream)
--       then per operation: the hold record (string)
-- ARGV  1  replica, proposed epoch, known epoch, acknowledged writes, start_us, windows, id memory_ms, retention_ms,
--          ledger entries at most
--       then per window: budget, window, flag, definition, start_ms, end_ms, expires_ms, limit, asserted limit or '?'
--       then per operation: its kind and fields (each part's header says which)
--
-- A hold record is one string: `state policy deadline_ms created_us grown_us owner operation trace|segment|segment…`
--   state   o open, x expired (unconfirmed), z released by an operator, c committed, r released, n recorded
--   policy  c charge, a accrued, r release
--   segment flag,budget:window,base,reserved,accrued,charged     flag: u usd, n count, s slots
--           base is empty if equal to reserved; accrued and charged are empty if 0
-- Empty words are '-'. Amounts are whole units (nano-dollars or counts) below 2^53, where doubles are exact; they become
-- text through %.0f only, because tostring() turns 15 digits into 1.23e+14.

local call, format = redis.call, string.format
local match, gmatch = string.match, string.gmatch
local max, floor = math.max, math.floor

local CLOSED = 9007199254740992 -- 2^53: a window whose sum is here admits nothing more
local LONGEST_HOLD_MS = 86400000
local DUE_AT_MOST = 32

local function text(number)
  return format('%.0f', number)
end

local replica, proposed_epoch, known_epoch, acked, start_us, n_windows, memory_ms, retention_ms, ledger_max =
  match(ARGV[1], '^(%S+) (%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
start_us, n_windows, retention_ms = tonumber(start_us), tonumber(n_windows), tonumber(retention_ms)
local first_hold = 4 + 2 * n_windows

local time = call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now_ms = floor(now_us / 1000)
local now_us_text = text(now_us)

local dirty = false -- whether anything of this batch was written

---- windows -----------------------------------------------------------------------------------------------------------

local windows, by_name = {}, {}
for i = 1, n_windows do
  local budget, window, flag, rest = match(ARGV[1 + i], '^(%S+) (%S+) (%a) (.*)$')
  local w = {
    key = KEYS[3 + 2 * i], ledger = KEYS[4 + 2 * i], name = budget .. ':' .. window, budget = budget, flag = flag,
    rest = rest, delta = {}, index = i,
  }
  windows[i] = w
  by_name[w.name] = w
end

-- The fields that change by HINCRBY at the end of the batch. `mine` is this replica's share of `spent` (P13).
local SUMS = { 'spent', 'held', 'unconfirmed', 'events', 'overruns', 'mine' }
local STORED = { spent = 'spent', held = 'held', unconfirmed = 'unconfirmed', events = 'events',
  overruns = 'overruns', mine = 'r:' .. replica }

local function describe(w)
  if not w.definition then
    local definition, start_ms, end_ms, expires_ms, limit, asserts = match(w.rest, '^(%S+) (%d+) (%d+) (%d+) (%S+) (%S+)$')
    w.definition, w.start_ms, w.end_ms, w.limit_text, w.asserts = definition, start_ms, end_ms, limit, asserts ~= '?'
    w.expires_ms = tonumber(expires_ms)
    local ends = tonumber(end_ms)
    w.stale = now_ms < tonumber(start_ms) or (ends > 0 and now_ms >= ends)
  end
  return w
end

local runtime_limits
local function runtime_limit(w)
  if not runtime_limits then
    local names = {}
    for i = 1, n_windows do names[i] = windows[i].budget end
    runtime_limits = call('HMGET', KEYS[2], unpack(names))
  end
  local stored = runtime_limits[w.index]
  if stored then
    local limit, until_ms = match(stored, '^(%S+) (%d+)')
    if until_ms == '0' or tonumber(until_ms) > now_ms then return limit end
  end
end

-- Reads the stored window, once; totals then follow the batch's own changes.
local function load(w)
  if w.total then return w end
  describe(w)
  local stored = call('HMGET', w.key, 'def', 'limit', 'asserted_us', 'spent', 'held', 'unconfirmed')
  w.exists, w.mismatch = stored[1] and true or false, stored[1] and stored[1] ~= w.definition and stored[1]
  w.stored_limit, w.asserted_us = stored[2], tonumber(stored[3] or '-1')
  local delta = w.delta
  w.total = {
    spent = tonumber(stored[4] or '0') + (delta.spent or 0),
    held = tonumber(stored[5] or '0') + (delta.held or 0),
    unconfirmed = tonumber(stored[6] or '0') + (delta.unconfirmed or 0),
  }
  w.runtime = runtime_limit(w)
  return w
end

-- The limit in force: a run-time change, else the one of the replica that started last.
local function limit_of(w)
  local limit = w.runtime or w.stored_limit or w.limit_text
  return limit == '-' and CLOSED or tonumber(limit), limit
end

-- Only reservations assert their configured limit; the replica that started last, by the store's clock, wins.
local function assert_limit(w)
  if w.asserts and start_us > w.asserted_us then
    w.asserted_us, w.asserting = start_us, true
    -- A denial must not write, but if it did not pass on a limit that changed, older replicas would spend by the old one.
    w.changing = w.exists and w.stored_limit ~= w.limit_text
    w.stored_limit = w.limit_text
  end
end

local function add(w, field, units)
  local delta = (w.delta[field] or 0) + units
  if delta >= CLOSED or delta <= -CLOSED then -- a sum of deltas stays exact, too
    call('HINCRBY', w.key, STORED[field], text(delta - units))
    delta = units
  end
  w.delta[field] = delta
  local total = w.total
  if total and total[field] then total[field] = total[field] + units end
end

local function admits(w, units)
  local total = w.total.spent + w.total.held + w.total.unconfirmed
  return total < CLOSED and total + units <= limit_of(w)
end

local function ledger(w, kind, id, amount, operation, trace)
  call('XADD', w.ledger, '*', 'k', kind, 'i', id, 'a', amount, 'o', operation, 't', trace)
end

-- Folds the oldest entries into one that carries their sum, so that an endless window's ledger stays bounded.
local function carry_forward(w)
  if call('XLEN', w.ledger) <= tonumber(ledger_max) then return end
  local oldest, sum = call('XRANGE', w.ledger, '-', '+', 'COUNT', 2048), 0
  for i = 1, #oldest do sum = sum + tonumber(oldest[i][2][6]) end
  local ids = {}
  for i = 1, #oldest do ids[i] = oldest[i][1] end
  call('XDEL', w.ledger, unpack(ids))
  ledger(w, 'carried', '-', text(sum), '-', '-')
end

local function store_window(w)
  local delta = w.delta
  if w.creating and not w.exists then
    call('HSET', w.key, 'def', w.definition, 'start_ms', w.start_ms, 'end_ms', w.end_ms)
  end
  if w.asserting and (w.creating or w.changing) then
    call('HSET', w.key, 'limit', w.limit_text, 'asserted_us', text(w.asserted_us))
  end
  for i = 1, #SUMS do
    local units = delta[SUMS[i]]
    if units and units ~= 0 then
      local sum = call('HINCRBY', w.key, STORED[SUMS[i]], text(units))
      if SUMS[i] == 'events' then
        w.first_entry = sum == units
        if floor(sum / 1024) ~= floor((sum - units) / 1024) then carry_forward(w) end
      end
    end
  end
  if (w.creating and not w.exists) or w.first_entry then
    describe(w)
    if w.expires_ms > 0 then
      call('PEXPIREAT', w.key, text(w.expires_ms))
      call('PEXPIREAT', w.ledger, text(w.expires_ms))
    end
  end
end

---- hold records ------------------------------------------------------------------------------------------------------

local records = {}
if #KEYS > first_hold then
  local stored = call('MGET', unpack(KEYS, first_hold + 1))
  for i = 1, #stored do records[KEYS[first_hold + i]] = stored[i] or nil end
end

local due_changes, due_ids = {}, {} -- id -> deadline text, or false to remove; kept in order, written together
local unconfirmed_changes, unconfirmed_ids = {}, {}

local function set_due(id, deadline)
  if due_changes[id] == nil then due_ids[#due_ids + 1] = id end
  due_changes[id] = deadline
end

local function set_unconfirmed(id, key)
  if unconfirmed_changes[id] == nil then unconfirmed_ids[#unconfirmed_ids + 1] = id end
  unconfirmed_changes[id] = key
end

local function store_index(zset, ids, score_of)
  local added, removed = {}, {}
  for i = 1, #ids do
    local score = score_of(ids[i])
    if score then
      added[#added + 1] = score
      added[#added + 1] = ids[i]
    else
      removed[#removed + 1] = ids[i]
    end
  end
  if #added > 0 then call('ZADD', zset, unpack(added)) end
  if #removed > 0 then call('ZREM', zset, unpack(removed)) end
end

local function store_due()
  if #due_ids == 0 then return end
  store_index(KEYS[3], due_ids, function(id) return due_changes[id] end)
  due_changes, due_ids = {}, {}
end

-- Kept by the expiry of the record, so that what nobody resolved leaves the index with it.
local function store_unconfirmed()
  if #unconfirmed_ids == 0 then return end
  store_index(KEYS[4], unconfirmed_ids, function(id)
    local key = unconfirmed_changes[id]
    return key and text(now_ms + call('PTTL', key))
  end)
  call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now_us_text:sub(1, -4))
end

local function parse(record)
  local state, policy, deadline, origin, operation, trace, segments =
    match(record, '^(%a) (%a) (%d+) (%d+ %d+ %S+) (%S+) ([^ |]+)|(.+)$')
  local hold = { state = state, policy = policy, deadline = deadline, origin = origin, operation = operation,
    trace = trace, segments = {} }
  for flag, name, base, reserved, accrued, charged in gmatch(segments, '(%a),([^,]+),(%d*),(%d+),(%d*),(%d*)') do
    hold.segments[#hold.segments + 1] = { flag = flag, name = name, base = base, reserved = reserved,
      accrued = accrued, charged = charged }
  end
  return hold
end

local function spell(hold)
  local parts = { hold.state .. ' ' .. hold.policy .. ' ' .. hold.deadline .. ' ' .. hold.origin .. ' '
    .. hold.operation .. ' ' .. hold.trace }
  for i = 1, #hold.segments do
    local s = hold.segments[i]
    parts[i + 1] = s.flag .. ',' .. s.name .. ',' .. s.base .. ',' .. s.reserved .. ',' .. s.accrued .. ',' .. s.charged
  end
  return table.concat(parts, '|')
end

local function units(text_or_empty)
  return tonumber(text_or_empty) or 0
end

local function store_record(key, hold, ...)
  local record = spell(hold)
  records[key] = record
  dirty = true
  call('SET', key, record, ...)
end

-- What an open hold counts: its reservation, or what it reported if that is more.
local function counted(segment)
  return max(tonumber(segment.reserved), segment.flag == 's' and 0 or units(segment.accrued))
end

-- The windows of a hold, in its order; nil if the request did not declare them all.
local function windows_of(hold)
  local found = {}
  for i = 1, #hold.segments do
    found[i] = by_name[hold.segments[i].name]
    if not found[i] then return nil end
  end
  return found
end

local function expired_charge(hold, segment)
  if segment.flag == 's' or hold.policy == 'r' then return 0 end
  if hold.policy == 'a' then return units(segment.accrued) end
  return counted(segment)
end

-- A hold past its deadline becomes unconfirmed. Everything that meets one does this first, so that what happens does not
-- depend on who noticed.
local function expire(id, key, hold, ws)
  hold.state = 'x'
  for i = 1, #hold.segments do
    local segment, w = hold.segments[i], ws[i]
    local charge = expired_charge(hold, segment)
    add(w, 'held', -counted(segment))
    segment.charged = ''
    if charge > 0 then
      segment.charged = text(charge)
      add(w, 'unconfirmed', charge)
      add(w, 'events', 1)
      ledger(w, 'expiry', id, segment.charged, hold.operation, hold.trace)
    end
  end
  set_due(id, false)
  set_unconfirmed(id, key)
  store_record(key, hold, 'KEEPTTL')
end

local function is_due(hold)
  return hold.state == 'o' and tonumber(hold.deadline) <= now_ms
end

-- The record's hold with its windows, expired if it is due; or nil and the reply that says why not.
local function open_record(id, key)
  local record = records[key]
  if not record then return nil, 'u' end
  local hold = parse(record)
  local ws = windows_of(hold)
  if not ws then return nil, 'v ' .. record end
  if is_due(hold) then expire(id, key, hold, ws) end
  return hold, ws
end

---- denials -----------------------------------------------------------------------------------------------------------

local function deny(w, requested)
  store_due()
  local _, limit = limit_of(w)
  local first = call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
  local t = w.total
  return table.concat({ 'd', w.name, limit, text(t.spent), text(t.held), text(t.unconfirmed), requested,
    first[2] and text(tonumber(first[2])) or '0' }, ' ')
end

local operations = {}
