-- reserve.lua: holds an amount in every window, or in none.
--
-- op     R id ttl_ms policy owner operation trace window:units window:units…     (windows by their place in ARGV)
-- reply  g           granted
--        p record    the same reservation was granted before; nothing changed
--        c record    the id is in use with other contents
--        w           a window does not contain the store's time
--        m window definition    the stored window is defined otherwise
--        d window limit spent held unconfirmed requested first_deadline_ms      denied; nothing was written

local deadlines = {}
local function deadline_after(ttl)
  local deadline = deadlines[ttl]
  if not deadline then
    deadline = text(now_ms + tonumber(ttl))
    deadlines[ttl] = deadline
  end
  return deadline
end

local function same_reservation(record, policy, amounts)
  local hold = parse(record)
  if hold.state == 'n' or hold.policy ~= policy then return false end
  local before, n = {}, 0
  for i = 1, #hold.segments do -- by budget, not by window: a retry after midnight names the new day
    local segment = hold.segments[i]
    before[match(segment.name, '^(.+):')] = segment.base ~= '' and segment.base or segment.reserved
  end
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do
    n = n + 1
    if before[windows[tonumber(i)].budget] ~= amount then return false end
  end
  return n == #hold.segments
end

function operations.R(fields, key)
  local id, ttl, policy, owner, operation, trace, amounts =
    match(fields, '^(%S+) (%d+) (%a) (%S+) (%S+) (%S+) (.+)$')
  local record = records[key]
  if record then
    return (same_reservation(record, policy, amounts) and 'p ' or 'c ') .. record
  end

  local denied, denied_amount, expires_ms = nil, nil, 0
  local parts, taken, n = {}, {}, 0
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do
    local w = load(windows[tonumber(i)])
    if w.stale then return 'w' end
    if w.mismatch then return 'm ' .. w.name .. ' ' .. w.mismatch end
    assert_limit(w)
    local requested = tonumber(amount)
    if not denied and not admits(w, requested) then denied, denied_amount = w, amount end
    n = n + 1
    parts[n] = w.flag .. ',' .. w.name .. ',,' .. amount .. ',,'
    taken[n] = requested
    expires_ms = max(expires_ms, w.expires_ms)
  end
  if denied then return deny(denied, denied_amount) end

  n = 0
  for i in gmatch(amounts, '(%d+):') do
    n = n + 1
    local w = windows[tonumber(i)]
    w.creating = true
    add(w, 'held', taken[n])
  end
  if expires_ms == 0 then expires_ms = now_ms + LONGEST_HOLD_MS + retention_ms end
  local deadline = deadline_after(ttl)
  record = 'o ' .. policy .. ' ' .. deadline .. ' ' .. now_us_text .. ' 0 ' .. owner .. ' ' .. operation .. ' ' .. trace
    .. '|' .. table.concat(parts, '|')
  records[key] = record
  dirty = true
  call('SET', key, record, 'PXAT', text(expires_ms))
  set_due(id, deadline)
  return 'g'
end
