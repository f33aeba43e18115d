-- holds.lua: reads and writes hold records, and lets those that are due expire.

local max = math.max
local by_name = {}
for i = 1, n_windows do by_name[windows[i].name] = windows[i] end
local sharer = ARGV[1] -- the replica in whose share it is what this batch settles

local function parse(record)
  local state, policy, deadline, origin, operation, trace, rest =
    match(record, '^(%a) (%a) (%d+) (%d+ %d+ %S+) (%S+) ([^ |]+)(.+)$')
  local segments, n = {}, 0
  for flag, name, base, reserved, accrued, charged in gmatch(rest, '|(%a),([^,]+),(%d*),(%d+),(%d*),(%d*)') do
    n = n + 1
    segments[n] = { flag = flag, name = name, base = base, reserved = reserved, accrued = accrued, charged = charged }
  end
  return { state = state, policy = policy, deadline = deadline, origin = origin, operation = operation, trace = trace,
    segments = segments, sharer = match(rest, ' (%S+)$') }
end

local function store_record(key, hold, ...)
  local record = hold.state .. ' ' .. hold.policy .. ' ' .. hold.deadline .. ' ' .. hold.origin .. ' ' .. hold.operation
    .. ' ' .. hold.trace
  for i = 1, #hold.segments do
    local s = hold.segments[i]
    record = record .. '|' .. s.flag .. ',' .. s.name .. ',' .. s.base .. ',' .. s.reserved .. ',' .. s.accrued .. ','
      .. s.charged
  end
  if hold.sharer then record = record .. ' ' .. hold.sharer end
  dirty = true
  call('SET', key, record, ...)
  return record
end

-- When the last of a hold's windows expires, in ms, and whether one of them never does.
local function windows_expire(hold)
  local last, endless = 0, false
  for i = 1, #hold.segments do
    local expires = tonumber(ARGV[by_name[hold.segments[i].name].at + 4])
    last, endless = max(last, expires), endless or expires == 0
  end
  return last, endless
end

-- The options of SET that give a hold's new record its expiry: it stays as long as its windows. Where one of them has no
-- end, an open hold's stays for very long: until somebody sees that it is due. Another one's stays as long as windows do,
-- lest such records pile up.
local function first_lifetime(hold)
  local last, endless = windows_expire(hold)
  if not endless then return 'PXAT', text(last) end
  if hold.state == 'o' then return 'PXAT', text(now_ms + LASTING_MS) end
  return 'PXAT', text(max(last, now_ms + 86400000 + match(ARGV[6], '^%S+ %d+ (%d+)')))
end

-- Those for a record that there is.
local function lifetime(hold)
  local _, endless = windows_expire(hold)
  if not endless then return 'KEEPTTL' end
  return first_lifetime(hold)
end

local function units(text_or_empty)
  return text_or_empty == '' and 0 or tonumber(text_or_empty)
end

-- What an open hold counts: its reservation, or what it reported if that is more. Slots are only ever reserved.
local function counted(segment)
  local reserved = tonumber(segment.reserved)
  if segment.accrued == '' or segment.flag == 's' then return reserved end
  return max(reserved, tonumber(segment.accrued))
end

local function ledger(w, kind, id, amount, operation, trace)
  if w.gone then return end
  w.entries = w.entries or {}
  w.n_entries = w.n_entries + 1
  w.entries[w.n_entries] = entry_text(amount, kind, id, operation, trace)
end

-- Writes spend into one window; `delta` is what the ledger gets, less than the amount if a charge is corrected.
local function spend(w, kind, id, amount, delta, hold)
  add(w, SPENT, amount)
  add(w, EVENTS, 1)
  ledger(w, kind, id, delta, hold.operation, hold.trace)
end

local function set_due(id, deadline)
  if deadline then
    due_added[n_added + 1], due_added[n_added + 2] = deadline, id
    n_added = n_added + 2
  else
    if n_added > 0 then store_due() end -- removals are written before additions
    due_removed[#due_removed + 1] = id
  end
end

local function set_unconfirmed(id, key)
  unconfirmed_changes = unconfirmed_changes or {}
  n_unconfirmed = n_unconfirmed + (key and 1 or -1)
  unconfirmed_changes[id] = key
end

-- What a segment of a hold is charged once the hold is past its deadline.
local function expiry_charge(hold, segment)
  if segment.flag == 's' or hold.policy == 'r' then return 0 end
  return hold.policy == 'a' and units(segment.accrued) or counted(segment)
end

-- A hold past its deadline becomes unconfirmed. Whatever meets one does this first, so that what happens does not depend
-- on who noticed.
local function expire(id, key, hold)
  hold.state = 'x'
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, charge = by_name[segment.name], expiry_charge(hold, segment)
    add(w, HELD, -counted(segment))
    segment.charged = ''
    if charge > 0 then
      segment.charged = text(charge)
      add(w, UNCONFIRMED, charge)
      add(w, EVENTS, 1)
      ledger(w, 'expiry', id, segment.charged, hold.operation, hold.trace)
    end
  end
  set_due(id, false)
  set_unconfirmed(id, key)
  return store_record(key, hold, lifetime(hold))
end

-- The reservation that a hold was granted to, if its caller chose the id.
local function request_of(hold)
  return match(hold.origin, '!([^!]+)!?$')
end

-- Whether a hold was released because its caller was gone before it received the grant (settle.lua, L s).
local function given_back(record)
  return record:sub(1, 1) == 'z' and match(record, '^z %a %d+ %d+ %d+ %S+! ')
end

-- Whether a record only keeps a request that was given up from being granted (settle.lua, L s): to all others it is unknown.
local function given_up(record)
  return record:sub(1, 1) == 'r' and match(record, '^r %a %d+ %d+ %d+ %S+ ! ')
end

-- The record of this key; or nil and the reply that says why not.
local function stored_record(key)
  local record = redis.pcall('GET', key)
  if not record then return nil, 'u' end
  if record.err then return nil, 'y ' .. record.err end
  return record
end

-- The hold, expired if it is due, and its record; or nil and the reply that says why not. While the store recovers, an
-- unknown id may be one that a replica has yet to replay: whoever asks for it is answered `l`, and asks again.
local function find(id, key)
  local record, why = stored_record(key)
  if record and given_up(record) then record, why = nil, 'u' end
  if not record then return nil, why == 'u' and recovering and 'l ' .. recovering or why end
  local hold = parse(record)
  for i = 1, #hold.segments do
    if not by_name[hold.segments[i].name] then return nil, 'v ' .. record end
  end
  if match(hold.state, '[oxz]') then -- else nothing will change
    for i = 1, #hold.segments do
      local w = by_name[hold.segments[i].name]
      if w.fault then return nil, 'y ' .. w.fault end
      if w.missing then return nil, 't ' .. w.name end
    end
  end
  if hold.state == 'o' and tonumber(hold.deadline) <= now_ms then record = expire(id, key, hold) end
  return hold, record
end

-- Whether find() knows no hold of this id.
local function unknown(why)
  return match(why, '^[ul]') ~= nil
end
