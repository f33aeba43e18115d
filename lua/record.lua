-- record.lua: spend without a reservation. Never refused for lack of budget.
--
-- op     N id late operation trace window:units window:units…     late 1: the window may have ended, or not begun
-- reply  k - units,units…    recorded
--        p record            recorded before with the same contents; nothing changed
--        c record            the id is in use with other contents
--        w                   a window does not contain the store's time
--        m window definition the stored window is defined otherwise

-- Writes spend into one window.
local function spend(w, kind, id, amount, delta, operation, trace)
  add(w, 'spent', amount)
  add(w, 'mine', amount)
  add(w, 'events', 1)
  ledger(w, kind, id, delta, operation, trace)
end

-- A record that keeps the id in memory, with the same shape as a hold's.
local function record_spend(id, key, state, operation, trace, amounts)
  local hold = { state = state, policy = 'c', deadline = text(now_ms), origin = now_us_text .. ' 0 -',
    operation = operation, trace = trace, segments = {} }
  local told = {}
  for i, amount in gmatch(amounts, '(%d+):%a?(%d+)') do
    local w = load(windows[tonumber(i)])
    if w.flag ~= 's' then
      w.creating = true
      spend(w, state == 'n' and 'record' or 'commit', id, tonumber(amount), amount, operation, trace)
    else
      amount = '0'
    end
    told[#told + 1] = amount
    hold.segments[#told] = { flag = w.flag, name = w.name, base = '', reserved = amount, accrued = '', charged = amount }
  end
  store_record(key, hold, 'PX', memory_ms)
  return table.concat(told, ',')
end

local function same_record(record, amounts)
  local hold, n = parse(record), 0
  if hold.state ~= 'n' then return false end
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do
    n = n + 1
    local segment = hold.segments[n]
    if not segment or match(segment.name, '^(.+):') ~= windows[tonumber(i)].budget or segment.charged ~= amount then
      return false
    end
  end
  return n == #hold.segments
end

function operations.N(fields, key)
  local id, late, operation, trace, amounts = match(fields, '^(%S+) (%d) (%S+) (%S+) (.+)$')
  local record = records[key]
  if record then
    return (same_record(record, amounts) and 'p ' or 'c ') .. record
  end
  for i in gmatch(amounts, '(%d+):') do
    local w = load(windows[tonumber(i)])
    if w.stale and late == '0' then return 'w' end
    if w.mismatch then return 'm ' .. w.name .. ' ' .. w.mismatch end
  end
  return 'k - ' .. record_spend(id, key, 'n', operation, trace, amounts)
end
