-- restore.lua: makes a hold known again as a replica knows it, after the store has lost it; or known at all, if it was
-- admitted and committed while the store was away. Nothing here asks for room: it was granted before.
--
-- op     K id window: …\nrecord   the hold is as its record says (prelude.lua), which also has what was asked for
-- reply  g                the hold was unknown or less than that, and is open, due or unconfirmed
--        k flags units,units…            it is settled now as the record says; flags as in settle.lua
--        p flags units,units… replica    it was settled so before; of a commit, in that replica's share
--        p                of one that is not settled: the hold is known and no less than that, whatever became of it
--        c record         it was settled otherwise before, or the id is another request's
--        t and f budget:window, y error as in settle.lua

-- A settlement wins over an open hold, and a commit over an operator's release, whoever is heard first.
local function merge(id, key, told)
  local hold, record = find(id, key)
  if not hold then return record:sub(1, 1) == 'v' and 'c ' .. record:sub(3) or record end
  if told.state == 'c' then
    local charged, amounts = {}, {}
    for i = 1, #told.segments do
      local segment = told.segments[i]
      charged[segment.name] = segment.charged == '' and '0' or segment.charged
    end
    for i = 1, #hold.segments do amounts[i] = charged[hold.segments[i].name] end
    if #amounts ~= #told.segments then return 'c ' .. record end
    return commit_at(id, key, hold, record, amounts, told.operation, told.trace)
  end
  if told.given_back then
    if request_of(hold) ~= request_of(told) then return 'c ' .. record end -- its id was free, and is another hold's
    if hold.state ~= 'z' then hold.origin = hold.origin .. '!' end
  end
  return release_hold(id, key, hold, record, told.state == 'z')
end

-- An open hold that had grown, had reported more, or was prolonged, when it was lost.
local function raise(id, key, hold, told)
  local by_window, changed = {}, false
  for i = 1, #hold.segments do by_window[hold.segments[i].name] = hold.segments[i] end
  for i = 1, #told.segments do
    local more, segment = told.segments[i], by_window[told.segments[i].name]
    if segment then
      local w, before = by_name[more.name], counted(segment)
      if tonumber(more.reserved) > tonumber(segment.reserved) then
        if segment.base == '' then segment.base = segment.reserved end
        segment.reserved, changed = more.reserved, true
      end
      if units(more.accrued) > units(segment.accrued) then segment.accrued, changed = more.accrued, true end
      add(w, HELD, counted(segment) - before)
    end
  end
  if tonumber(told.deadline) > tonumber(hold.deadline) then
    hold.deadline, changed = told.deadline, true
    set_due(id, told.deadline)
  end
  if not changed then return 'p' end
  hold.origin = match(hold.origin, '^(%d+) ') .. ' ' .. now_us_text .. ' ' .. match(hold.origin, '(%S+)$')
  store_record(key, hold, 'KEEPTTL')
  return 'g'
end

local function restore_open(id, key, hold)
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, charge = by_name[segment.name], units(segment.charged)
    repair_window(w)
    if hold.state == 'o' then
      add(w, HELD, counted(segment))
    elseif charge > 0 then
      add(w, UNCONFIRMED, charge)
      add(w, EVENTS, 1)
      ledger(w, 'expiry', id, segment.charged, hold.operation, hold.trace)
    end
  end
  store_record(key, hold, first_lifetime(hold))
  if hold.state == 'o' then set_due(id, hold.deadline) else set_unconfirmed(id, key) end
  return 'g'
end

local function restore_commit(id, key, hold)
  local overrun = '-'
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, amount = by_name[segment.name], units(segment.charged)
    segment.charged = text(amount)
    if segment.flag ~= 's' then
      repair_window(w)
      spend(w, 'commit', id, amount, segment.charged, hold)
      if amount > tonumber(segment.reserved) then
        add(w, OVERRUNS, 1)
        overrun = 'o'
      end
    end
  end
  hold.sharer = sharer
  store_record(key, hold, 'PX', match(ARGV[6], '^%S+ (%d+)'))
  return 'k ' .. overrun .. ' ' .. charges(hold)
end

-- A release is restored without a window: else the hold would be opened again by a replica that knows of no release.
local function restore_release(key, hold)
  for i = 1, #hold.segments do hold.segments[i].charged = '' end
  if hold.state == 'z' then
    store_record(key, hold, first_lifetime(hold))
  else
    store_record(key, hold, 'PX', match(ARGV[6], '^%S+ (%d+)'))
  end
  return 'k - ' .. charges(hold)
end

function operations.K(op, key)
  local id, record = match(op, '^K (%S+)[^\n]*\n(.+)$')
  local told = parse(record)
  told.given_back = given_back(record)
  local open = told.state == 'o' or told.state == 'x'
  for i = 1, #told.segments do
    local segment = told.segments[i]
    local w = by_name[segment.name]
    if w.fault then return 'y ' .. w.fault end
    if w.missing then return 't ' .. w.name end
  end
  local stored, why = stored_record(key)
  if not stored and why ~= 'u' then return why end
  if stored and not given_up(stored) then
    if not open then return merge(id, key, told) end
    local known = parse(stored)
    return known.state == 'o' and raise(id, key, known, told) or 'p'
  end
  for i = 1, #told.segments do
    local segment = told.segments[i]
    local w = by_name[segment.name]
    local counts = told.state == 'o' and counted(segment) or units(segment.charged)
    if total(w) + counts >= FULL then return 'f ' .. w.name end
  end
  -- The audit asks since when it counts this much.
  told.origin = match(told.origin, '^(%d+) ') .. ' ' .. now_us_text .. ' ' .. match(told.origin, '(%S+)$')
  if open then return restore_open(id, key, told) end
  return told.state == 'c' and restore_commit(id, key, told) or restore_release(key, told)
end
