-- record.lua: spend without a reservation. Never refused for lack of budget.
--
-- op     N id late operation trace window:units …    late 1: the window may have ended, or not begun
-- reply  k - units,units…    recorded
--        p - units,units… replica budget:window,…    recorded before with the same contents; nothing changed. In that
--                            replica's share, and in those windows: it may have been yesterday
--        c record            the id is in use with other contents
--        b budget:window     the tenant has as many budgets as it may
--        w                   a window does not contain the store's time
--        t budget:window     that window was begun and is not here; nothing was written
--        m budget definition    another definition of the budget is registered, and late is 0; nothing was written
--        f budget:window     that window would count 2^62 units or more; nothing was written
--        y error             a key of this request is of another type; nothing was written

-- Where the same was recorded, and in whose share; nil if this is not the same.
local function recorded_in(record, amounts)
  local hold, before, names = parse(record), {}, {}
  for i = 1, #hold.segments do before[match(hold.segments[i].name, '^(.+):')] = hold.segments[i] end
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do
    local segment = before[match(windows[tonumber(i)].name, '^(.+):')]
    if not segment or segment.charged ~= amount then return nil end
    names[#names + 1] = segment.name
  end
  if hold.state ~= 'n' or #names ~= #hold.segments then return nil end
  return (hold.sharer or '-') .. ' ' .. table.concat(names, ',')
end

function operations.N(op, key)
  local id, late, operation, trace, amounts = match(op, '^N (%S+) (%d) (%S+) (%S+) (.+)$')
  local told = {}
  for amount in gmatch(amounts, ':(%d+)') do told[#told + 1] = amount end
  local record, why = stored_record(key)
  if not record and why ~= 'u' then return why end
  if record and not given_up(record) then
    local where = recorded_in(record, amounts)
    return where and 'p - ' .. table.concat(told, ',') .. ' ' .. where or 'c ' .. record
  end
  local hold = { state = 'n', policy = 'c', deadline = text(now_ms), origin = now_us_text .. ' 0 -',
    operation = operation, trace = trace, segments = {}, sharer = sharer }
  for i in gmatch(amounts, '(%d+):') do
    local w = windows[tonumber(i)]
    if w.fault then return 'y ' .. w.fault end
    load(w)
    if w.stale and late == '0' then return 'w' end
    if w.conflict and late == '0' then return 'm ' .. match(w.name, '^(.+):') .. ' ' .. w.conflict end
    if w.missing then return 't ' .. w.name end
    if w.surplus and late == '0' then return 'b ' .. w.name end
    local n = #hold.segments + 1
    if total(w) + tonumber(told[n]) >= FULL then return 'f ' .. w.name end
    hold.segments[n] = { flag = ARGV[w.at], name = w.name, base = '', reserved = told[n], accrued = '', charged = told[n] }
  end
  for i = 1, #told do
    local w = by_name[hold.segments[i].name]
    if hold.segments[i].flag ~= 's' then
      w.creating, w.registering = true, w.registering or late == '0'
      spend(w, 'record', id, tonumber(told[i]), told[i], hold)
    end
  end
  store_record(key, hold, 'PX', match(ARGV[6], '^%S+ (%d+)'))
  return 'k - ' .. table.concat(told, ',')
end
