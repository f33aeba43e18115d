-- admission.lua: whether a window has room. Reads each window once; its totals then follow the batch's own changes.

local function load(w)
  if w.spent then return w end
  local flag, definition, start_ms, end_ms, expires_ms, limit, asserts =
    match(w.about, '^(%a) (%S+) (%d+) (%d+) (%d+) (%S+) (%S)$')
  local stored = call('HMGET', w.key, 'def', 'limit', 'asserted_us', 'spent', 'held', 'unconfirmed')
  local delta = w.delta
  w.flag, w.definition, w.start_ms, w.end_ms, w.expires_ms = flag, definition, start_ms, end_ms, tonumber(expires_ms)
  w.stale = now_ms < tonumber(start_ms) or (end_ms ~= '0' and now_ms >= tonumber(end_ms))
  w.exists = stored[1]
  w.mismatch = stored[1] and stored[1] ~= definition and stored[1]
  w.configured, w.asserts = limit, asserts == '!'
  w.limit, w.asserted_us = stored[2] or limit, stored[3] or '0'
  w.spent = tonumber(stored[4] or 0) + (delta.spent or 0)
  w.held = tonumber(stored[5] or 0) + (delta.held or 0)
  w.unconfirmed = tonumber(stored[6] or 0) + (delta.unconfirmed or 0)
  if meta[4] then -- some limit was changed at run time
    local changed = call('HGET', KEYS[2], match(w.name, '^(.+):'))
    local runtime, until_ms = match(changed or '', '^(%S+) (%d+)')
    if runtime and (until_ms == '0' or tonumber(until_ms) > now_ms) then w.runtime = runtime end
  end
  return w
end

-- Only reservations assert their configured limit; the replica that started last, by the store's clock, wins.
local function assert_limit(w)
  if w.asserts and w.asserted_us ~= ARGV[4] and tonumber(w.asserted_us) < tonumber(ARGV[4]) then
    w.asserting, w.asserted_us = true, ARGV[4]
    -- A denial must not write, but if it did not pass on a limit that changed, older replicas would spend by the old one.
    w.changing = w.exists and w.limit ~= w.configured
    w.limit = w.configured
  end
end

local function admits(w, units)
  local total, limit = w.spent + w.held + w.unconfirmed, w.runtime or w.limit
  return total < CLOSED and total + units <= (limit == '-' and CLOSED or tonumber(limit))
end

local function deny(w, requested)
  store_due()
  denied_any = true
  local first = call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
  return table.concat({ 'd', w.name, w.runtime or w.limit, text(w.spent), text(w.held), text(w.unconfirmed), requested,
    first[2] and text(tonumber(first[2])) or '0' }, ' ')
end
