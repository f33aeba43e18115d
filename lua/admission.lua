-- admission.lua: whether a window has room.

-- When this replica started, never later than now, and its id, which decides a tie: texts of as many digits.
local now_us = now_us_text + 0
local start_us = ARGV[4] + 0
if start_us <= 0 then start_us = now_us + start_us end -- an age
local claim = format('%016.0f', math.min(start_us, now_us)) .. ' ' .. ARGV[1]

local unlisted = 0 -- budgets of this batch that the tenant has not had

-- What decides on admission; computed once for each window of a batch that admits.
local function load(w)
  if w.admits then return end
  w.admits = true
  local at = w.at
  local budget = match(w.name, '^(.+):')
  if not w.exists and not w.begun then -- perhaps of a budget more than the tenant may have
    unlisted = unlisted + 1
    w.surplus = call('ZCOUNT', KEYS[6], text(now_ms), '+inf') + unlisted > match(ARGV[6], '(%d+) %d+$') + 0
  end
  -- The first reservation or record in a budget registers its definition. A replica that defines it otherwise gets
  -- nothing new, until a migration replaces the registered one; its windows are others, so it may settle all the same.
  local definition = ARGV[at + 1]
  if definition ~= '-' or w.exists then
    w.registered = call('HGET', KEYS[5], 'd:' .. budget)
    w.conflict = w.registered and w.registered ~= (definition ~= '-' and definition or w.exists) and w.registered
  end
  w.stale = now_ms < ARGV[at + 2] + 0 or (ARGV[at + 3] ~= '0' and now_ms >= ARGV[at + 3] + 0)
  if not w.limit and definition ~= '-' then w.limit = ARGV[at + 5] end
  if meta[3] then -- some limit was changed at run time
    local changed = call('HGET', KEYS[2], budget)
    local runtime, until_ms = match(changed or '', '^(%S+) (%d+)')
    if runtime and (until_ms == '0' or tonumber(until_ms) > now_ms) then w.runtime = runtime end
  end
  local limit = w.runtime or w.limit
  w.cap = limit and (tonumber(limit) or CLOSED - 1) -- none: neither the store nor this replica knows it
end

-- Only reservations, and repairs, assert their configured limit; the replica that started last, by the store's clock, wins.
-- The claim of one that started in the future is from before the clock was set back: the next replica replaces it.
local function load_asserting(w)
  load(w)
  w.asserted = true
  if ARGV[w.at + 6] == '!' and (w.claim < claim or tonumber(match(w.claim, '^%d+')) > now_us) then
    local configured = ARGV[w.at + 5]
    w.asserting, w.claim = true, claim
    w.differs = w.exists and w.limit ~= configured
    w.limit = configured
    w.cap = tonumber(w.runtime or w.limit) or CLOSED - 1
  end
end

-- A window is repaired with its limit: what is replayed there, a reservation has brought. It brought the definition, too.
local function repair_window(w)
  load_asserting(w)
  w.creating, w.changing, w.registering = true, true, ARGV[w.at + 1] ~= '-'
end

local function deny(w, requested)
  store_due()
  denied_any = true
  local first = call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
  return table.concat({ 'd', w.name, w.runtime or w.limit, text(w.spent + w[SPENT]), text(w.held + w[HELD]),
    text(w.unconfirmed + w[UNCONFIRMED]), requested, first[2] and text(tonumber(first[2])) or '0' }, ' ')
end
