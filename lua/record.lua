-- record.lua: record spend without a reservation. Never refused because the budget lacks room.
--
-- op     RECORD N id late owner operation trace scope window:units …
--        late 1: the windows may have ended, or not begun; the owner has only the request (docs/wire.md)
-- reply  UNREADABLE y error           a key of this request is of another type
--        REPLAYED p - units,units… replica budget:window,…    the same was recorded before, in that replica's subtotals
--                                     and in those windows, which may be yesterday's
--        CONFLICT c record            the id is in use with other contents
--        STALE_WINDOW w               a window does not contain the store's time
--        OTHER_DEFINITION m budget definition    another definition of the budget is registered, and late is 0
--        MISSING_WINDOW t budget:window    that window was begun, and its key is missing
--        TOO_MANY_BUDGETS b budget:window    the tenant has as many budgets as it may
--        WINDOW_FULL f budget:window    that window would count 2^62 units or more
--        DONE k - units,units…
--        All but the last write nothing.

-- The reply to an id that is in use. As in reserve.lua, digests decide, else amounts by budget.
local function repeated_spend(record, owner, amounts)
  local hold, before, names = parse_record(record), {}, {}
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    before[match(segment.name, '^(.+):')], names[i] = segment.charged, segment.name
  end
  local digest, recorded = match(owner, DIGEST), match(record, DIGEST)
  local same = digest == recorded
  if not (digest and recorded) then
    local n = 0
    same = hold.state == 'n'
    for i, amount in gmatch(amounts, '(%d+):(%d+)') do
      same = same and before[match(windows[tonumber(i)].name, '^(.+):')] == amount
      n = n + 1
    end
    same = same and n == #names
  end
  if not same then return 'c ' .. record end
  return 'p - ' .. charges_of(hold) .. ' ' .. (hold.replica or '-') .. ' ' .. table.concat(names, ',')
end

local function record_spend(op, key)
  local id, late, owner, operation, trace, scope, amounts =
    match(op, '^N (%S+) (%d) (%S+) (%S+) (%S+) (%S+) (.+)$')
  local record, reason = read_record(key)
  if not record and reason ~= 'u' then return reason end
  if record and not is_tombstone(record) then return repeated_spend(record, owner, amounts) end
  local units = {}
  for amount in gmatch(amounts, ':(%d+)') do units[#units + 1] = amount end
  local hold = { state = 'n', policy = 'c', deadline = text(now_ms), origin = now_us_text .. ' 0 ' .. owner,
    operation = operation, trace = trace, scope = scope, segments = {}, replica = settling_replica }
  for i in gmatch(amounts, '(%d+):') do
    local w = windows[tonumber(i)]
    if w.fault then return 'y ' .. w.fault end
    load_limit(w)
    if w.stale and late == '0' then return 'w' end
    if w.conflict and late == '0' then return 'm ' .. match(w.name, '^(.+):') .. ' ' .. w.conflict end
    if w.missing then return 't ' .. w.name end
    if w.surplus and late == '0' then return 'b ' .. w.name end
    local n = #hold.segments + 1
    if total(w) + tonumber(units[n]) >= FULL then return 'f ' .. w.name end
    hold.segments[n] = { flag = ARGV[w.at], name = w.name, base = '', reserved = units[n], accrued = '', charged = units[n] }
  end
  for i = 1, #units do
    local w = by_name[hold.segments[i].name]
    if hold.segments[i].flag ~= 's' then
      w.creating, w.registering = true, w.registering or late == '0'
      add_spend(w, 'record', id, tonumber(units[i]), units[i], hold)
    end
  end
  store_record(key, hold, 'PX', id_memory_ms())
  return 'k - ' .. table.concat(units, ',')
end

operations.N = record_spend
