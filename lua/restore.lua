-- restore.lua: write a hold that the store has lost, from a replica's journal; or a hold that was granted and settled
-- while the store was away. It needs no room: that was granted before.
--
-- op     RESTORE K id window: …\nrecord    the hold is as this record says
-- reply  UNREADABLE y error            a key of this request is of another type
--        MISSING_WINDOW t budget:window    that window was begun, and its key is missing
--        CONFLICT c record             it was settled otherwise, or the id is another request's
--        REPLAYED p flags units,units… replica    it was settled so before; of a commit, in that replica's subtotals
--        REPLAYED p                    the record is of an unsettled hold, and the store's hold counts at least as much
--        WINDOW_FULL f budget:window    that window would count 2^62 units or more
--        DONE k flags units,units…     it is settled now as the record says; flags as for COMMIT and RELEASE
--        GRANTED g                     the hold was unknown, or less; it is open, due or unconfirmed now

-- Apply the settlement of a record to a hold that the store has. A settlement wins over an open hold, and a commit over
-- an operator's release, in either order of arrival.
local function settle_known(id, key, restored)
  local hold, record = find_hold(id, key)
  if not hold then return record:sub(1, 1) == 'v' and 'c ' .. record:sub(3) or record end
  if restored.state == 'c' then
    local charged, units = {}, {}
    for i = 1, #restored.segments do
      local segment = restored.segments[i]
      charged[segment.name] = segment.charged == '' and '0' or segment.charged
    end
    for i = 1, #hold.segments do units[i] = charged[hold.segments[i].name] end
    if #units ~= #restored.segments then return 'c ' .. record end
    return commit_hold(id, key, hold, record, units, restored.operation, restored.trace)
  end
  if restored.is_unreceived then
    if request_of(hold) ~= request_of(restored) then return 'c ' .. record end -- the id was free, and is another hold's
    if hold.state ~= 'z' then hold.origin = hold.origin .. '!' end
  end
  return release_hold(id, key, hold, record, restored.state == 'z')
end

-- Raise an open hold to the totals and the deadline that it had when it was lost.
local function raise(id, key, hold, restored)
  local by_window, changed = {}, false
  for i = 1, #hold.segments do by_window[hold.segments[i].name] = hold.segments[i] end
  for i = 1, #restored.segments do
    local more, segment = restored.segments[i], by_window[restored.segments[i].name]
    local w, increase = by_name[more.name], segment and counted_units(more) - counted_units(segment) or 0
    if increase > 0 and total(w) + increase >= FULL then return 'f ' .. w.name end
  end
  for i = 1, #restored.segments do
    local more, segment = restored.segments[i], by_window[restored.segments[i].name]
    if segment then
      local w, before = by_name[more.name], counted_units(segment)
      if tonumber(more.reserved) > tonumber(segment.reserved) then
        if segment.base == '' then segment.base = segment.reserved end
        segment.reserved, changed = more.reserved, true
      end
      if units_of(more.accrued) > units_of(segment.accrued) then segment.accrued, changed = more.accrued, true end
      add(w, HELD, counted_units(segment) - before)
    end
  end
  if tonumber(restored.deadline) > tonumber(hold.deadline) then
    hold.deadline, changed = restored.deadline, true
    set_due(id, restored.deadline)
  end
  if not changed then return 'p' end
  mark_change(hold)
  store_record(key, hold, 'KEEPTTL')
  return 'g'
end

local function restore_unsettled(id, key, hold)
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, charge = by_name[segment.name], units_of(segment.charged)
    restore_window(w)
    if hold.state == 'o' then
      add(w, HELD, counted_units(segment))
    elseif charge > 0 then
      add_charge(w, id, charge, hold)
    end
  end
  store_record(key, hold, new_expiry(hold))
  if hold.state == 'o' then set_due(id, hold.deadline) else set_unconfirmed(id, key) end
  return 'g'
end

local function restore_commit(id, key, hold)
  local overrun = '-'
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, amount = by_name[segment.name], units_of(segment.charged)
    segment.charged = text(amount)
    if segment.flag ~= 's' then
      restore_window(w)
      add_spend(w, 'commit', id, amount, segment.charged, hold)
      if amount > tonumber(segment.reserved) then
        add(w, OVERRUNS, 1)
        overrun = 'o'
      end
    end
  end
  hold.replica = settling_replica
  store_record(key, hold, 'PX', id_memory_ms())
  return 'k ' .. overrun .. ' ' .. charges_of(hold)
end

-- Without the record of a release, a replica that has not seen it would open the hold again. It needs no window.
local function restore_release(key, hold)
  for i = 1, #hold.segments do hold.segments[i].charged = '' end
  if hold.state == 'z' then
    store_record(key, hold, new_expiry(hold))
  else
    store_record(key, hold, 'PX', id_memory_ms())
  end
  return 'k - ' .. charges_of(hold)
end

local function restore(op, key)
  local id, record = match(op, '^K (%S+)[^\n]*\n(.+)$')
  local restored = parse_record(record)
  restored.is_unreceived = is_unreceived(record)
  local is_unsettled = restored.state == 'o' or restored.state == 'x'
  for i = 1, #restored.segments do
    local w = by_name[restored.segments[i].name]
    if w.fault then return 'y ' .. w.fault end
    if w.missing then return 't ' .. w.name end
  end
  local stored, reason = read_record(key)
  if not stored and reason ~= 'u' then return reason end
  if stored and not is_tombstone(stored) then
    if not is_unsettled then return settle_known(id, key, restored) end
    local known = parse_record(stored)
    return known.state == 'o' and raise(id, key, known, restored) or 'p'
  end
  for i = 1, #restored.segments do
    local segment = restored.segments[i]
    local w = by_name[segment.name]
    local counted = restored.state == 'o' and counted_units(segment) or units_of(segment.charged)
    if total(w) + counted >= FULL then return 'f ' .. w.name end
  end
  mark_change(restored)
  if is_unsettled then return restore_unsettled(id, key, restored) end
  return restored.state == 'c' and restore_commit(id, key, restored) or restore_release(key, restored)
end

operations.K = restore
