-- commit.lua: commit a hold. Spend is a fact: a commit is never refused because the budget lacks room, because it is
-- late, or because it is more than was reserved.
--
-- op     COMMIT D id window:mode+units …
--        COMMIT_WITH_REMARK M id remark trace window:mode+units …    the remark is added to the hold's operation, the
--                                    trace replaces its own
--        modes: EXACT x; RESERVED r what was reserved; ACCRUED a what was accrued, and at least the units given
-- reply  UNREADABLE y error          a key of this request is of another type
--        RECOVERING l until_ms       unknown id while the store recovers: a replica may have yet to replay it
--        UNKNOWN_HOLD u              unknown id
--        OTHER_WINDOWS v record      the request lacks windows of the hold
--        MISSING_WINDOW t budget:window    that window was begun, and its key is missing
--        CONFLICT c record           settled otherwise before, or not a hold
--        REPLAYED p - units,units… replica    the same was committed before, in that replica's subtotals
--        WINDOW_FULL f budget:window    that window would count 2^62 units or more
--        DONE k flags units,units…    in the order of the record; flags: OVERRUN o, LATE l, or -
--        All but the last change nothing, except that a due hold becomes unconfirmed.

-- The units that a commit gives one segment, as text.
local function committed_units(segment, modes, units)
  if segment.flag == 's' then return '0' end
  local mode = modes[segment.name]
  if mode == 'r' then return segment.reserved end
  local given = units[segment.name] or '0'
  if mode == 'a' and units_of(segment.accrued) > tonumber(given) then return segment.accrued end
  return given
end

-- The charges of a hold's segments, as replies list them.
local function charges_of(hold)
  local charges = {}
  for i = 1, #hold.segments do
    local charged = hold.segments[i].charged
    charges[i] = charged == '' and '0' or charged
  end
  return table.concat(charges, ',')
end

-- Take out of a window what an unsettled segment counts; return the part that was a charge after expiry.
local function take_back(hold, segment, w)
  if hold.state == 'o' then
    add(w, HELD, -counted_units(segment))
    return 0
  end
  local charged = units_of(segment.charged)
  add(w, UNCONFIRMED, -charged)
  return charged
end

local function leave_indexes(hold, id)
  if hold.state == 'o' then set_due(id, false) else set_unconfirmed(id, false) end
end

-- Commit a hold that was found, with these units, a text for each of its segments.
local function commit_hold(id, key, hold, record, units, operation, trace)
  local state, overrun = hold.state, ''
  if state == 'r' or state == 'n' then return 'c ' .. record end
  if state == 'c' then
    local before = charges_of(hold)
    return before == table.concat(units, ',') and 'p - ' .. before .. ' ' .. (hold.replica or '-') or 'c ' .. record
  end
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w = by_name[segment.name]
    local before = state == 'o' and counted_units(segment) or units_of(segment.charged)
    if total(w) - before + tonumber(units[i]) >= FULL then return 'f ' .. w.name end
  end
  hold.operation, hold.trace = operation, trace
  local kind = state == 'o' and 'commit' or 'correction'
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w = by_name[segment.name]
    local back = take_back(hold, segment, w)
    if segment.flag ~= 's' then
      local amount = tonumber(units[i])
      add_spend(w, kind, id, amount, back == 0 and units[i] or text(amount - back), hold)
      if amount > tonumber(segment.reserved) then
        add(w, OVERRUNS, 1)
        overrun = 'o'
      end
    end
    segment.charged = units[i]
  end
  leave_indexes(hold, id)
  local flags = overrun .. (state == 'o' and '' or 'l')
  hold.state, hold.replica = 'c', settling_replica
  store_record(key, hold, 'PX', id_memory_ms())
  return 'k ' .. (flags == '' and '-' or flags) .. ' ' .. table.concat(units, ',')
end

local function commit_by_id(id, key, amounts, remark, trace)
  local hold, record = find_hold(id, key)
  if not hold then return record end
  local modes, given, units = {}, {}, {}
  for i, mode, amount in gmatch(amounts, '(%d+):(%a)(%d+)') do
    local name = windows[tonumber(i)].name
    modes[name], given[name] = mode, amount
  end
  for i = 1, #hold.segments do units[i] = committed_units(hold.segments[i], modes, given) end
  local operation = hold.operation
  if remark ~= '-' then operation = operation == '-' and remark or operation .. '%20' .. remark end
  return commit_hold(id, key, hold, record, units, operation, trace ~= '-' and trace or hold.trace)
end

local function commit(op, key)
  local id, amounts = match(op, '^D (%S+) (.+)$')
  return commit_by_id(id, key, amounts, '-', '-')
end

local function commit_with_remark(op, key)
  local id, remark, trace, amounts = match(op, '^M (%S+) (%S+) (%S+) (.+)$')
  return commit_by_id(id, key, amounts, remark, trace)
end

operations.D = commit
operations.M = commit_with_remark
