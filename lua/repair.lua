-- repair.lua: what a replica tells again after the store has gone back in time (P13). Nothing here asks for room: it was
-- granted before. While anybody repairs, reservations wait.
--
-- op     S replica op                      a settlement (D, M, K, N) that is in the share of another replica
--        T id window:units                 the share of this replica in the window's spend is at least so much
--        O id policy deadline_ms created_us owner operation trace window:reserved:accrued …    this hold was open
-- reply  a               S: that replica has told its share itself; nothing was changed. Else as op
--        k - units       T: so much was missing
--        g               O: it was unknown or smaller, and is open again; or due, if its deadline has passed
--        p               O: it is known, whatever has become of it
--        t budget:window that window was begun and is not here; nothing was changed
--        f budget:window that window would count 2^62 units or more; nothing was changed
--        y error         a key of this request is of another type; nothing was changed

-- What a replica tells again is much, or its way is long: nothing is granted before it has told all of it.
call('HSET', KEYS[1], 'recovering_until', text(max(now_ms + 1000, recovering and recovering + 0 or 0)))
dirty = true
recovering = nil -- to this batch, what the store does not know is lost

-- Each settlement is in one replica's share, whoever tells of it. The field `t:` of a window tells that a replica has told
-- its share of it, of this timeline: what it has settled is in there, though its id may be beyond its memory.
function operations.S(op, key)
  local replica, settlement = match(op, '^S (%S+) (.+)$')
  local before = {}
  for i in gmatch(settlement, ' (%d+):') do
    local w = windows[tonumber(i)]
    if w then
      if call('HGET', w.key, 't:' .. replica) == epoch then return 'a' end
      before[w] = w[SPENT]
    end
  end
  sharer = replica
  local reply = operations[settlement:sub(1, 1)](settlement, key)
  sharer = ARGV[1]
  for w, units in pairs(before) do
    local moved = w[SPENT] - units
    if moved > 0 then -- the end of the batch will add it to the share of who told it
      call('HINCRBY', w.key, 'r:' .. replica, text(moved))
      call('HINCRBY', w.key, 'r:' .. ARGV[1], text(-moved))
    end
  end
  return reply
end

function operations.T(op)
  local i, units = match(op, '(%d+):(%d+)$')
  local w = windows[tonumber(i)]
  if w.fault then return 'y ' .. w.fault end
  if w.missing then return 't ' .. w.name end
  local lacking = tonumber(units) - tonumber(call('HGET', w.key, 'r:' .. ARGV[1]) or '0') - w[SPENT]
  if total(w) + lacking >= FULL then return 'f ' .. w.name end
  call('HSET', w.key, 't:' .. ARGV[1], epoch)
  if lacking <= 0 then return 'k - 0' end
  repair_window(w)
  add(w, SPENT, lacking)
  add(w, EVENTS, 1)
  ledger(w, 'repair', '-', text(lacking), '-', '-')
  return 'k - ' .. text(lacking)
end

-- An open hold that had grown, had reported more, or was prolonged, when it was lost.
local function raise(id, key, hold, deadline, amounts)
  local changed = false
  for i, reserved, accrued in gmatch(amounts, '(%d+):(%d+):(%d+)') do
    local w, segment = windows[tonumber(i)], nil
    for j = 1, #hold.segments do
      if hold.segments[j].name == w.name then segment = hold.segments[j] end
    end
    if segment then
      local before = counted(segment)
      if tonumber(reserved) > tonumber(segment.reserved) then
        if segment.base == '' then segment.base = segment.reserved end
        segment.reserved, changed = reserved, true
      end
      if tonumber(accrued) > units(segment.accrued) then segment.accrued, changed = accrued, true end
      add(w, HELD, counted(segment) - before)
    end
  end
  if tonumber(deadline) > tonumber(hold.deadline) then
    hold.deadline, changed = deadline, true
    set_due(id, deadline)
  end
  if not changed then return 'p' end
  hold.origin = match(hold.origin, '^(%d+) ') .. ' ' .. now_us_text .. ' ' .. match(hold.origin, '(%S+)$')
  store_record(key, hold, 'KEEPTTL')
  return 'g'
end

function operations.O(op, key)
  local id, policy, deadline, created, owner, operation, trace, amounts =
    match(op, '^O (%S+) (%a) (%d+) (%d+) (%S+) (%S+) (%S+) (.+)$')
  for i in gmatch(amounts, '(%d+):%d+:') do
    local w = windows[tonumber(i)]
    if w.fault then return 'y ' .. w.fault end
    if w.missing then return 't ' .. w.name end
  end
  local record, why = stored_record(key)
  if not record and why ~= 'u' then return why end
  if record and not given_up(record) then
    local known = parse(record)
    return known.state == 'o' and raise(id, key, known, deadline, amounts) or 'p'
  end
  for i, reserved, accrued in gmatch(amounts, '(%d+):(%d+):(%d+)') do
    local w = windows[tonumber(i)]
    if total(w) + max(tonumber(reserved), tonumber(accrued)) >= FULL then return 'f ' .. w.name end
  end
  local hold = { state = 'o', policy = policy, deadline = deadline, origin = created .. ' ' .. now_us_text .. ' ' .. owner,
    operation = operation, trace = trace, segments = {} }
  for i, reserved, accrued in gmatch(amounts, '(%d+):(%d+):(%d+)') do
    local w = windows[tonumber(i)]
    repair_window(w)
    local segment = { flag = ARGV[w.at], name = w.name, base = '', reserved = reserved,
      accrued = accrued == '0' and '' or accrued, charged = '' }
    add(w, HELD, counted(segment))
    hold.segments[#hold.segments + 1] = segment
  end
  store_record(key, hold, open_lifetime(hold))
  set_due(id, deadline)
  return 'g'
end
