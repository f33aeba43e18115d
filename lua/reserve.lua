-- reserve.lua: holds an amount in every window, or in none.
--
-- op     R id ttl_ms policy owner operation trace window:units window:units…     (windows by their place in ARGV)
-- reply  g           granted
--        p record    the same reservation was granted before; nothing changed
--        c record    the id is in use with other contents
--        w           a window does not contain the store's time
--        m budget:window definition    the stored window is defined otherwise
--        d budget:window limit spent held unconfirmed requested first_deadline_ms    denied; nothing was written

-- By budget, not by window: a retry after midnight names the new day.
local function same_reservation(record, policy, amounts)
  local before, n = {}, 0
  for name, base, reserved in gmatch(record, '|%a,([^,]+),(%d*),(%d+)') do
    before[match(name, '^(.+):')] = base ~= '' and base or reserved
    n = n + 1
  end
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do
    if before[match(windows[tonumber(i)].name, '^(.+):')] ~= amount then return false end
    n = n - 1
  end
  return n == 0 and match(record, '^[^n] (%a)') == policy
end

-- A replay is answered before anything else is said of the request.
local function unless_replayed(key, policy, amounts, otherwise, ...)
  local record = call('GET', key)
  if record then return (same_reservation(record, policy, amounts) and 'p ' or 'c ') .. record end
  if type(otherwise) == 'string' then return otherwise end
  return otherwise(...)
end

function operations.R(op, key)
  local id, ttl, policy, labels, amounts = match(op, '^R (%S+) (%d+) (%a) (%S+ %S+ %S+) (.+)$')
  local taken, segments, n, expires_ms = {}, '', 0, 0
  local denied, denied_amount
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do
    local w = load(windows[tonumber(i)])
    if w.stale then return unless_replayed(key, policy, amounts, 'w') end
    if w.mismatch then return unless_replayed(key, policy, amounts, 'm ' .. w.name .. ' ' .. w.mismatch) end
    assert_limit(w)
    local requested = tonumber(amount)
    if not denied and not admits(w, requested) then denied, denied_amount = w, amount end
    segments = segments .. '|' .. w.flag .. ',' .. w.name .. ',,' .. amount .. ',,'
    taken[n + 1], taken[n + 2] = w, requested
    n = n + 2
    if w.expires_ms > expires_ms then expires_ms = w.expires_ms end
  end
  if denied then return unless_replayed(key, policy, amounts, deny, denied, denied_amount) end
  if expires_ms == 0 then -- only windows without end: a day to live, and then as long as a window is kept
    expires_ms = now_ms + 86400000 + tonumber(match(ARGV[6], '^%S+ %d+ (%d+)'))
  end
  local deadline = text(now_ms + ttl)
  local record = 'o ' .. policy .. ' ' .. deadline .. ' ' .. now_us_text .. ' 0 ' .. labels .. segments
  if not call('SET', key, record, 'NX', 'PXAT', text(expires_ms)) then
    return unless_replayed(key, policy, amounts)
  end
  dirty = true
  for i = 1, n, 2 do
    taken[i].creating = true
    add(taken[i], 'held', taken[i + 1])
  end
  set_due(id, deadline)
  return 'g'
end
