-- extend.lua: a heartbeat, a report of use, or growth. Totals are cumulative and the largest wins, so that a retry is
-- harmless.
--
-- op     EXTEND E id ttl_ms mode window:accrued:reserved[:expected] …
--        modes: HEARTBEAT 0             set the deadline
--               GROW 1                  an open hold keeps its deadline
--               HEARTBEAT_NO_SOONER 2   set the deadline unless the new one is sooner
--               REPORT 3                only a report of use: the hold keeps its deadline, and if that has passed, it
--                                       stays unconfirmed and is charged by its policy
--        expected    the reserved total that the growth adds to
-- reply  UNREADABLE y error             a key of this request is of another type
--        RECOVERING l until_ms          the store recovers from a loss: an unknown id may be replayed, growth waits
--        UNKNOWN_HOLD u                 unknown id
--        OTHER_WINDOWS v record         the request lacks windows of the hold
--        MISSING_WINDOW t budget:window    that window was begun, and its key is missing
--        CONFLICT c record              the hold is settled, was released by an operator, or has lived for 24 h
--        OUTGROWN a record              more than expected is reserved already
--        WINDOW_FULL f budget:window    that window would count 2^62 units or more
--        OTHER_DEFINITION m budget definition    another definition is registered than that of the window
--        UNKNOWN_LIMIT q budget:window    neither the store nor this replica has a limit
--        DENIED d … total               as for RESERVE: growth, or the return of an expired hold, has no room; total is
--                                       the amount that the hold would have counted
--        EXTENDED e record              the hold as it is now
--        All but the last change nothing, except that a due hold becomes unconfirmed.
--
-- Reported spend needs no admission. A larger reservation does, and so does the revival of an expired hold that had given
-- money back: in the windows that admitted the hold, with the limit that is in force there.

local HEARTBEAT, HEARTBEAT_NO_SOONER, REPORT = '0', '2', '3'

-- The change of one segment: new totals, units counted before and after, and the parts of the difference that are a
-- fact and that need room.
local function change_of(hold, segment, accrued, reserved)
  local new_reserved = max(tonumber(segment.reserved), reserved or 0)
  local new_accrued = segment.flag == 's' and 0 or max(units_of(segment.accrued), accrued or 0)
  local before = hold.state == 'o' and counted_units(segment) or units_of(segment.charged)
  local after = max(new_reserved, new_accrued)
  return { reserved = new_reserved, accrued = new_accrued, before = before, after = after,
    fact = max(before, new_accrued) - before, room = max(0, after - max(before, new_accrued)) }
end

-- The reply that refuses the changes, or nil.
local function refusal_of(hold, changes)
  for i = 1, #changes do
    local change, w = changes[i], by_name[hold.segments[i].name]
    if total(w) + change.after - change.before >= FULL then return 'f ' .. w.name end
    if change.room > 0 then
      if recovering then return 'l ' .. recovering end
      load_limit(w)
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
    if change.before > 0 then add_entry(w, 'revival', id, text(-change.before), hold) end
  end
  if hold.state ~= 'o' or change.after ~= change.before then mark_change(hold) end
  if change.reserved > tonumber(segment.reserved) then
    if segment.base == '' then segment.base = segment.reserved end
    segment.reserved = text(change.reserved)
  end
  segment.accrued = change.accrued > 0 and text(change.accrued) or ''
  segment.charged = ''
end

-- Add a report that arrives after the deadline. It is a fact, so it is not denied. A hold that an operator has released
-- counts the use only.
local function add_late_report(id, key, hold, accrued)
  local charges = {}
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w = by_name[segment.name]
    local used = segment.flag == 's' and 0 or max(units_of(segment.accrued), accrued[segment.name] or 0)
    segment.accrued = used > 0 and text(used) or ''
    charges[i] = hold.state == 'z' and used or expiry_charge(hold, segment)
    if total(w) + charges[i] - units_of(segment.charged) >= FULL then return 'f ' .. w.name end
  end
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, charge, before = by_name[segment.name], charges[i], units_of(segment.charged)
    if charge > before then
      segment.charged = text(charge)
      add_charge(w, id, charge - before, hold)
    end
  end
  mark_change(hold)
  hold.state = 'x'
  set_unconfirmed(id, key)
  return 'e ' .. store_record(key, hold, kept_expiry(hold))
end

local function extend(op, key)
  local id, ttl, mode, amounts = match(op, '^E (%S+) (%d+) (%d) (.*)$')
  local hold, record = find_hold(id, key)
  if not hold then return record end
  local state = hold.state
  if state == 'c' or state == 'r' or state == 'n' then return 'c ' .. record end
  local accrued, reserved, expected = {}, {}, {}
  for i, a, r, e in gmatch(amounts, '(%d+):(%d+):(%d+):?(%d*)') do
    local name = windows[tonumber(i)].name
    accrued[name], reserved[name], expected[name] = tonumber(a), tonumber(r), tonumber(e)
  end
  if mode == REPORT and state ~= 'o' then return add_late_report(id, key, hold, accrued) end
  if state == 'z' then
    -- An operator's release is obeyed: only a commit or a report still corrects it. A release of an unreceived grant is
    -- not: a worker has the hold by a replay.
    if not is_unreceived(record) then return 'c ' .. record end
    hold.origin = match(hold.origin, '^(.+)!$')
  end
  local created_ms = tonumber(match(hold.origin, '^(%d+)%d%d%d '))
  local deadline = math.min(now_ms + ttl, created_ms + 86400000)
  if deadline <= now_ms then return 'c ' .. record end
  local changes = {}
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local known = expected[segment.name]
    if known and tonumber(segment.reserved) > known then return 'a ' .. record end
    changes[i] = change_of(hold, segment, accrued[segment.name], reserved[segment.name])
  end
  local refused = refusal_of(hold, changes)
  if refused then return refused end
  for i = 1, #changes do apply_change(id, hold, hold.segments[i], changes[i]) end
  if state ~= 'o' or mode == HEARTBEAT or (mode == HEARTBEAT_NO_SOONER and deadline > tonumber(hold.deadline)) then
    hold.deadline = text(deadline)
    set_due(id, hold.deadline)
  end
  if state ~= 'o' then set_unconfirmed(id, false) end
  hold.state = 'o'
  return 'e ' .. store_record(key, hold, kept_expiry(hold))
end

operations.E = extend
