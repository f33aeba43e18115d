-- reserve.lua: hold an amount in every window of a request, or in none.
--
-- op     RESERVE R id ttl_ms policy expires_ms window:units …\nowner operation trace scope|segment|segment…
--        expires_ms is the expiry of the record; the second line is stored as it is
-- reply  REPLAYED p record                  the same reservation was granted before
--        CONFLICT c record                  the id is in use with other contents
--        UNREADABLE y error                 a key of this request is of another type
--        STALE_WINDOW w                     a window does not contain the store's time
--        OTHER_DEFINITION m budget definition    another definition of the budget is registered
--        MISSING_WINDOW t budget:window     that window was begun, and its key is missing
--        TOO_MANY_BUDGETS b budget:window   the tenant has as many budgets as it may
--        UNKNOWN_LIMIT q budget:window      neither the store nor this replica has a limit
--        RECOVERING l until_ms              the store recovers from a loss until then
--        DENIED d budget:window limit spent held unconfirmed requested first_deadline_ms
--        TOO_MANY_HOLDS h holds first_deadline_ms    the tenant has as many holds as it may
--        GRANTED g
--        All but the last write nothing.

-- The reply to a repeated id, or nil for a new one. The digests of both requests decide, if both have one: a retry after
-- a redefinition is a replay. Else amounts are compared by budget, not by window: a retry after midnight names the new
-- day. The id of an unreceived grant (release.lua) is free, except for the very request that was granted; only a grant
-- replaces its record, so that until then a worker that has the hold by a replay can commit it.
local function replay(key, op)
  local record = redis.pcall('GET', key)
  if not record then return nil end
  if record.err then return 'y ' .. record.err end
  local policy, amounts, owner = match(op, '^R %S+ %S+ (%a) %d+([^\n]+)\n(%S+)')
  local digest, granted = match(owner, DIGEST), match(record, DIGEST)
  local same = digest == granted
  if not (digest and granted) then
    local before, n = {}, 0
    for name, base, reserved in gmatch(record, '|%a,([^,]+),(%d*),(%d+)') do
      before[match(name, '^(.+):')] = base ~= '' and base or reserved
      n = n + 1
    end
    same = match(record, '^[^n] (%a)') == policy
    for i, amount in gmatch(amounts, '(%d+):(%d+)') do
      same = same and before[match(windows[tonumber(i)].name, '^(.+):')] == amount
      n = n - 1
    end
    same = same and n == 0
  end
  local unreceived = same and match(record, '^z %a %d+ %d+ %d+ [^!]+(!%S+)! ')
  if unreceived and unreceived ~= match(owner, '!.+$') then return nil end
  return (same and 'p ' or 'c ') .. record
end

local holds_left -- holds that the tenant may still add
local holds_max = sub(ARGV[6], -12) + 0

local ttl_before, deadline_before, times_before

local function reserve(op, key)
  local id, ttl, policy, expires, amounts, rest = match(op, '^R (%S+) (%S+) (%a) (%d+)([^\n]+)\n(.+)$')
  local taken, n = { 0, 0, 0, 0 }, 0
  local denied, denied_amount
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do
    local w, requested = windows[i + 0], amount + 0
    if w.fault then return replay(key, op) or 'y ' .. w.fault end
    if not w.asserted then assert_limit(w) end
    if w.stale then return replay(key, op) or 'w' end
    if w.conflict then return replay(key, op) or 'm ' .. match(w.name, '^(.+):') .. ' ' .. w.conflict end
    if w.missing then return replay(key, op) or 't ' .. w.name end
    if w.surplus then return replay(key, op) or 'b ' .. w.name end
    if not w.cap then return replay(key, op) or 'q ' .. w.name end
    local counted = total(w)
    if (counted >= CLOSED or counted + requested > w.cap) and not denied then denied, denied_amount = w, amount end
    taken[n + 1], taken[n + 2] = w, requested
    n = n + 2
  end
  if recovering then return replay(key, op) or 'l ' .. recovering end
  if denied then
    local again = replay(key, op)
    if again then return again end
    -- A denial writes nothing but a changed limit: without it, older replicas would go on to spend by the old one.
    for i in gmatch(amounts, '(%d+):') do
      local w = windows[tonumber(i)]
      w.changing = w.changing or w.differs
    end
    return deny(denied, denied_amount)
  end
  if not holds_left then
    write_due()
    holds_left = holds_max - n_due - n_unconfirmed
  end
  if holds_left <= 0 then
    write_due()
    local first = call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
    return replay(key, op)
      or 'h ' .. text(holds_max - holds_left) .. ' ' .. (first[2] and text(tonumber(first[2])) or '0')
  end
  if ttl ~= ttl_before then
    ttl_before, deadline_before = ttl, text(now_ms + ttl)
    times_before = ' ' .. deadline_before .. ' ' .. now_us_text .. ' 0 '
  end
  local record = 'o ' .. policy .. times_before .. rest
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

operations.R = reserve
