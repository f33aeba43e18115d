-- reserve.lua: holds an amount in every window, or in none.
--
-- op     R id ttl_ms policy expires_ms window:units window:units…\nowner operation trace|segment|segment…
--                    (expires_ms: when its record does; windows by their place in ARGV; then what its record has of them)
-- reply  g           granted
--        p record    the same reservation was granted before; nothing changed
--        c record    the id is in use with other contents
--        w           a window does not contain the store's time
--        t budget:window    that window was begun and is not here; nothing was written
--        m budget definition    another definition of the budget is registered; nothing was written
--        l until_ms  the store is being repaired until then; nothing was written
--        h holds first_deadline_ms    the tenant has as many holds as it may; nothing was written
--        b budget:window    the tenant has as many budgets as it may; nothing was written
--        q budget:window    the limit is known neither to the store nor to this replica; nothing was written
--        y error     a key of this request is of another type; nothing was written
--        d budget:window limit spent held unconfirmed requested first_deadline_ms    denied; nothing was written

-- A replay is answered before anything else is said of a request. Compared by budget, not by window: a retry after
-- midnight names the new day. An id that was released for a caller that was gone is free, except for that very request;
-- but only a grant replaces its record: until then, a worker that has the hold by a replay may commit it.
local function replay(key, op)
  local record = redis.pcall('GET', key)
  if not record then return nil end
  if record.err then return 'y ' .. record.err end
  local policy, amounts, owner = match(op, '^R %S+ %S+ (%a) %d+([^\n]+)\n(%S+)')
  local before, n = {}, 0
  for name, base, reserved in gmatch(record, '|%a,([^,]+),(%d*),(%d+)') do
    before[match(name, '^(.+):')] = base ~= '' and base or reserved
    n = n + 1
  end
  local same = match(record, '^[^n] (%a)') == policy
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do
    same = same and before[match(windows[tonumber(i)].name, '^(.+):')] == amount
    n = n - 1
  end
  same = same and n == 0
  local given_back = same and match(record, '^z %a %d+ %d+ %d+ [^!]+(!%S+)! ')
  if given_back and given_back ~= match(owner, '!.+$') then return nil end
  return (same and 'p ' or 'c ') .. record
end

local holds_left -- that the tenant may have beyond those that it has
local holds_max = ARGV[6]:sub(-12) + 0

local ttl_before, deadline_before, beginning_before

function operations.R(op, key)
  local id, ttl, policy, expires, amounts, rest = match(op, '^R (%S+) (%S+) (%a) (%d+)([^\n]+)\n(.+)$')
  local taken, n = { 0, 0, 0, 0 }, 0
  local denied, denied_amount
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do
    local w, requested = windows[i + 0], amount + 0
    if w.fault then return replay(key, op) or 'y ' .. w.fault end
    if not w.asserted then load_asserting(w) end
    if w.stale then return replay(key, op) or 'w' end
    if w.conflict then return replay(key, op) or 'm ' .. match(w.name, '^(.+):') .. ' ' .. w.conflict end
    if w.missing then return replay(key, op) or 't ' .. w.name end
    if w.surplus then return replay(key, op) or 'b ' .. w.name end
    if not w.cap then return replay(key, op) or 'q ' .. w.name end
    local counts = total(w)
    if (counts >= CLOSED or counts + requested > w.cap) and not denied then denied, denied_amount = w, amount end
    taken[n + 1], taken[n + 2] = w, requested
    n = n + 2
  end
  if recovering then return replay(key, op) or 'l ' .. recovering end
  if denied then
    local again = replay(key, op)
    if again then return again end
    -- A denial must not write, but if it did not pass on a limit that changed, older replicas would spend by the old
    -- one.
    for i in gmatch(amounts, '(%d+):') do
      local w = windows[tonumber(i)]
      w.changing = w.changing or w.differs
    end
    return deny(denied, denied_amount)
  end
  if not holds_left then
    store_due()
    holds_left = holds_max - n_due - n_unconfirmed
  end
  if holds_left <= 0 then
    store_due()
    local first = call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
    return replay(key, op)
      or 'h ' .. text(holds_max - holds_left) .. ' ' .. (first[2] and text(tonumber(first[2])) or '0')
  end
  if ttl ~= ttl_before then
    ttl_before, deadline_before = ttl, text(now_ms + ttl)
    beginning_before = ' ' .. deadline_before .. ' ' .. now_us_text .. ' 0 '
  end
  local record = 'o ' .. policy .. beginning_before .. rest
  if not call('SET', key, record, 'NX', 'PXAT', expires) then
    local again = replay(key, op)
    if again then return again end
    call('SET', key, record, 'PXAT', expires)
  end
  for i = 1, n, 2 do
    taken[i].creating, taken[i].changing, taken[i].registering = true, true, true
    add(taken[i], HELD, taken[i + 1])
  end
  holds_left = holds_left - 1
  dirty = true
  due_added[n_added + 1], due_added[n_added + 2] = deadline_before, id
  n_added = n_added + 2
  return 'g'
end
