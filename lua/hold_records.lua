-- hold_records.lua (part): the reader and the writer of hold records, the expiry of holds, and their indexes.
--
-- docs/wire.md has the grammar of a record. Two other places spell records, for speed: reserve.lua writes that of a new
-- hold, and fast_path.lua compares and replaces whole texts that its client sends.

local max = math.max
local by_name = {}
for i = 1, n_windows do by_name[windows[i].name] = windows[i] end
local settling_replica = ARGV[1] -- the subtotals of this replica include the spend of this batch

local function parse_record(record)
  local state, policy, deadline, origin, operation, trace, scope, rest =
    match(record, '^(%a) (%a) (%d+) (%d+ %d+ %S+) (%S+) (%S+) ([^ |]+)(.+)$')
  local segments, n = {}, 0
  for flag, name, base, reserved, accrued, charged in gmatch(rest, '|(%a),([^,]+),(%d*),(%d+),(%d*),(%d*)') do
    n = n + 1
    segments[n] = { flag = flag, name = name, base = base, reserved = reserved, accrued = accrued, charged = charged }
  end
  return { state = state, policy = policy, deadline = deadline, origin = origin, operation = operation, trace = trace,
    scope = scope, segments = segments, replica = match(rest, ' (%S+)$') }
end

-- Write a record with these options of SET; return its text.
local function store_record(key, hold, ...)
  local record = hold.state .. ' ' .. hold.policy .. ' ' .. hold.deadline .. ' ' .. hold.origin .. ' ' .. hold.operation
    .. ' ' .. hold.trace .. ' ' .. hold.scope
  for i = 1, #hold.segments do
    local s = hold.segments[i]
    record = record .. '|' .. s.flag .. ',' .. s.name .. ',' .. s.base .. ',' .. s.reserved .. ',' .. s.accrued .. ','
      .. s.charged
  end
  if hold.replica then record = record .. ' ' .. hold.replica end
  dirty = true
  call('SET', key, record, ...)
  return record
end

-- The request that was granted, if the caller chose the id of the hold.
local function request_of(hold)
  return match(hold.origin, '!([^!]+)!?$')
end

-- Whether a hold was released because its caller was gone before it received the grant (release.lua).
local function is_unreceived(record)
  return record:sub(1, 1) == 'z' and match(record, '^z %a %d+ %d+ %d+ %S+! ')
end

-- Whether a record is a tombstone, which keeps a late request from being granted (release.lua). Other operations treat
-- its id as unknown.
local function is_tombstone(record)
  return record:sub(1, 1) == 'r' and match(record, '^r %a %d+ %d+ %d+ %S+ ! ')
end

-- Note the time at which a hold began to count another amount: the audit needs it.
local function mark_change(hold)
  hold.origin = match(hold.origin, '^(%d+) ') .. ' ' .. now_us_text .. ' ' .. match(hold.origin, '(%S+)$')
end

-- The expiry of a hold's last window in ms, and whether one of its windows has no end.
local function windows_expire(hold)
  local last, endless = 0, false
  for i = 1, #hold.segments do
    local expires = tonumber(ARGV[by_name[hold.segments[i].name].at + 4])
    last, endless = max(last, expires), endless or expires == 0
  end
  return last, endless
end

-- The options of SET for a new record: it expires with its windows. In windows without end, the record of an open hold
-- stays for years, until a request finds the hold due; other records stay as long as a window that ends now.
local function new_expiry(hold)
  local last, endless = windows_expire(hold)
  if not endless then return 'PXAT', text(last) end
  if hold.state == 'o' then return 'PXAT', text(now_ms + LASTING_MS) end
  return 'PXAT', text(max(last, now_ms + 86400000 + match(ARGV[6], '^%S+ %d+ (%d+)')))
end

-- The options of SET for a changed record.
local function kept_expiry(hold)
  local _, endless = windows_expire(hold)
  if not endless then return 'KEEPTTL' end
  return new_expiry(hold)
end

-- The milliseconds that the id of a settled hold is remembered.
local function id_memory_ms()
  return match(ARGV[6], '^%S+ (%d+)')
end

local function units_of(text_or_empty)
  return text_or_empty == '' and 0 or tonumber(text_or_empty)
end

-- The units that an open hold counts: its reservation, or what it accrued if that is more. Slots are only reserved.
local function counted_units(segment)
  local reserved = tonumber(segment.reserved)
  if segment.accrued == '' or segment.flag == 's' then return reserved end
  return max(reserved, tonumber(segment.accrued))
end

-- Add an entry to the ledger of a window. Its scope is that of the hold without the units.
local function add_entry(w, kind, id, units, hold)
  if w.gone then return end
  w.entries = w.entries or {}
  w.n_entries = w.n_entries + 1
  w.entries[w.n_entries] = now_us_text .. ' ' .. units .. ' ' .. kind .. ' ' .. id .. ' ' .. hold.operation .. ' '
    .. hold.trace .. ' ' .. match(hold.scope, '^[^;]+')
end

-- Add spend to a window. The entry has `entry_units`, which are less than the amount if it corrects a charge.
local function add_spend(w, kind, id, units, entry_units, hold)
  add(w, SPENT, units)
  add(w, EVENTS, 1)
  add_entry(w, kind, id, entry_units, hold)
end

-- Charge a hold that is past its deadline.
local function add_charge(w, id, units, hold)
  add(w, UNCONFIRMED, units)
  add(w, EVENTS, 1)
  add_entry(w, 'expiry', id, text(units), hold)
end

-- Index an open hold by its deadline; false removes it.
local function set_due(id, deadline)
  if deadline then
    due_added[n_added + 1], due_added[n_added + 2] = deadline, id
    n_added = n_added + 2
  else
    if n_added > 0 then write_due() end -- removals are written before additions
    due_removed[#due_removed + 1] = id
  end
end

-- Index an unconfirmed hold by the key of its record; false removes it.
local function set_unconfirmed(id, key)
  unconfirmed_changes = unconfirmed_changes or {}
  n_unconfirmed = n_unconfirmed + (key and 1 or -1)
  unconfirmed_changes[id] = key
end

-- The charge of a segment whose hold is past its deadline.
local function expiry_charge(hold, segment)
  if segment.flag == 's' or hold.policy == 'r' then return 0 end
  return hold.policy == 'a' and units_of(segment.accrued) or counted_units(segment)
end

-- Make a due hold unconfirmed; return its record. Each operation does this first, so that the result does not depend on
-- the one that finds the hold due.
local function expire(id, key, hold)
  hold.state = 'x'
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, charge = by_name[segment.name], expiry_charge(hold, segment)
    add(w, HELD, -counted_units(segment))
    segment.charged = ''
    if charge > 0 then
      segment.charged = text(charge)
      add_charge(w, id, charge, hold)
    end
  end
  set_due(id, false)
  set_unconfirmed(id, key)
  return store_record(key, hold, kept_expiry(hold))
end

-- The record of this key; or nil and the reply that gives the reason.
local function read_record(key)
  local record = redis.pcall('GET', key)
  if not record then return nil, 'u' end
  if record.err then return nil, 'y ' .. record.err end
  return record
end

-- The hold, expired if it is due, and its record; or nil and the reply that gives the reason. While the store recovers,
-- a replica may have yet to replay an unknown id: the reply is `l` then, and the client retries.
local function find_hold(id, key)
  local record, reason = read_record(key)
  if record and is_tombstone(record) then record, reason = nil, 'u' end
  if not record then return nil, reason == 'u' and recovering and 'l ' .. recovering or reason end
  local hold = parse_record(record)
  for i = 1, #hold.segments do
    if not by_name[hold.segments[i].name] then return nil, 'v ' .. record end
  end
  if match(hold.state, '[oxz]') then -- other states do not change
    for i = 1, #hold.segments do
      local w = by_name[hold.segments[i].name]
      if w.fault then return nil, 'y ' .. w.fault end
      if w.missing then return nil, 't ' .. w.name end
    end
  end
  if hold.state == 'o' and tonumber(hold.deadline) <= now_ms then record = expire(id, key, hold) end
  return hold, record
end

-- Whether find_hold() gave this reason because the id is unknown.
local function is_unknown(reason)
  return match(reason, '^[ul]') ~= nil
end
