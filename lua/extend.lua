-- extend.lua: a heartbeat, a report of what was used, and growth. Totals are cumulative and the largest wins, so that a
-- retry is harmless.
--
-- op     E id ttl_ms keep window:accrued:reserved …    keep 1: an open hold keeps its deadline (growth); 2: unless the
--                                                       new one is later; 3: only a report of what was used, for a hold
--                                                       that no worker keeps open: it keeps its deadline, and if that
--                                                       has passed, it stays unconfirmed, and is charged by its policy
--        window:accrued:reserved:found                 only if no more than that was reserved before
-- reply  e record    as it is now
--        a record    more was reserved already than was found; nothing changed
--        d … total   denied as for reserve: the growth, or the return of an expired hold, has no room; nothing changed.
--                    The last figure is what the hold would have counted
--        m budget definition    as for reserve, of what needs room: another definition than the window's is registered
--        c record    the hold is settled, was released by an operator, or has lived its 24 h
--        u, v record, t and f budget:window, y error as for settle;  q budget:window as for reserve;  l until_ms as for both
--
-- Spend that was reported needs no admission. What does: a larger reservation, and the revival of an expired hold that
-- had given money back; in the windows that admitted the hold, with the limit that is in force there.

-- How one segment changes: new totals, what it counted, what it will count, and what of the difference needs room.
local function change_of(hold, segment, accrued, reserved)
  local new_reserved = max(tonumber(segment.reserved), reserved or 0)
  local new_accrued = segment.flag == 's' and 0 or max(units(segment.accrued), accrued or 0)
  local before = hold.state == 'o' and counted(segment) or units(segment.charged)
  local after = max(new_reserved, new_accrued)
  return { reserved = new_reserved, accrued = new_accrued, before = before, after = after,
    fact = max(before, new_accrued) - before, room = max(0, after - max(before, new_accrued)) }
end

local function lacking(hold, changes)
  for i = 1, #changes do
    local change, w = changes[i], by_name[hold.segments[i].name]
    if total(w) + change.after - change.before >= FULL then return 'f ' .. w.name end
    if change.room > 0 then
      if recovering then return 'l ' .. recovering end
      load(w)
      if w.conflict then return 'm ' .. match(w.name, '^(.+):') .. ' ' .. w.conflict end
      if not w.cap then return 'q ' .. w.name end
      if total(w) >= CLOSED or total(w) + change.fact + change.room > w.cap then
        return deny(w, text(change.room)) .. ' ' .. text(change.after)
      end
    end
  end
end

local function apply_change(id, hold, segment, change)
  local w = by_name[segment.name]
  if hold.state == 'o' then
    add(w, HELD, change.after - change.before)
  else
    add(w, UNCONFIRMED, -change.before)
    add(w, HELD, change.after)
    if change.before > 0 then ledger(w, 'revival', id, text(-change.before), hold.operation, hold.trace) end
  end
  if hold.state ~= 'o' or change.after ~= change.before then -- the audit asks since when it counts this much
    hold.origin = match(hold.origin, '^(%d+) ') .. ' ' .. now_us_text .. ' ' .. match(hold.origin, '(%S+)$')
  end
  if change.reserved > tonumber(segment.reserved) then
    if segment.base == '' then segment.base = segment.reserved end
    segment.reserved = text(change.reserved)
  end
  segment.accrued = change.accrued > 0 and text(change.accrued) or ''
  segment.charged = ''
end

-- A report that comes after the deadline. It is a fact, so it is not denied. Where an operator has released the hold, it
-- counts what was used, and nothing else.
local function report(id, key, hold, accrued)
  local charges = {}
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w = by_name[segment.name]
    local used = segment.flag == 's' and 0 or max(units(segment.accrued), accrued[segment.name] or 0)
    segment.accrued = used > 0 and text(used) or ''
    charges[i] = hold.state == 'z' and used or expiry_charge(hold, segment)
    if total(w) + charges[i] - units(segment.charged) >= FULL then return 'f ' .. w.name end
  end
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, charge, before = by_name[segment.name], charges[i], units(segment.charged)
    if charge > before then
      segment.charged = text(charge)
      add(w, UNCONFIRMED, charge - before)
      add(w, EVENTS, 1)
      ledger(w, 'expiry', id, text(charge - before), hold.operation, hold.trace)
    end
  end
  hold.origin = match(hold.origin, '^(%d+) ') .. ' ' .. now_us_text .. ' ' .. match(hold.origin, '(%S+)$')
  hold.state = 'x'
  set_unconfirmed(id, key)
  return 'e ' .. store_record(key, hold, lifetime(hold))
end

function operations.E(op, key)
  local id, ttl, keep, amounts = match(op, '^E (%S+) (%d+) (%d) (.*)$')
  local hold, record = find(id, key)
  if not hold then return record end
  local state = hold.state
  if state == 'c' or state == 'r' or state == 'n' then return 'c ' .. record end
  local accrued, reserved, found = {}, {}, {}
  for i, a, r, f in gmatch(amounts, '(%d+):(%d+):(%d+):?(%d*)') do
    local name = windows[tonumber(i)].name
    accrued[name], reserved[name], found[name] = tonumber(a), tonumber(r), tonumber(f)
  end
  if keep == '3' and state ~= 'o' then return report(id, key, hold, accrued) end
  if state == 'z' then
    -- An operator's release is obeyed: only what it cost is corrected yet. One for a caller that was gone is not: a worker
    -- has the hold by a replay.
    if not given_back(record) then return 'c ' .. record end
    hold.origin = match(hold.origin, '^(.+)!$')
  end
  local created_ms = tonumber(match(hold.origin, '^(%d+)%d%d%d '))
  local deadline = math.min(now_ms + ttl, created_ms + 86400000)
  if deadline <= now_ms then return 'c ' .. record end
  local changes = {}
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    if found[segment.name] and tonumber(segment.reserved) > found[segment.name] then return 'a ' .. record end
    changes[i] = change_of(hold, segment, accrued[segment.name], reserved[segment.name])
  end
  local denied = lacking(hold, changes)
  if denied then return denied end
  for i = 1, #changes do apply_change(id, hold, hold.segments[i], changes[i]) end
  if state ~= 'o' or keep == '0' or (keep == '2' and deadline > tonumber(hold.deadline)) then
    hold.deadline = text(deadline)
    set_due(id, hold.deadline)
  end
  if state ~= 'o' then set_unconfirmed(id, false) end
  hold.state = 'o'
  return 'e ' .. store_record(key, hold, lifetime(hold))
end
