-- admission.lua (part): limits of windows, and denials.

-- The start of this replica, never later than now, and its id, which decides a tie: texts of equal length.
local now_us = now_us_text + 0
local start_us = ARGV[4] + 0
if start_us <= 0 then start_us = now_us + start_us end -- an age
local claim = format('%016.0f', math.min(start_us, now_us)) .. ' ' .. ARGV[1]

local n_new_budgets = 0 -- budgets of this batch that the tenant does not have yet

-- Compute, once for each window of a batch, all that decides on admission.
local function load_limit(w)
  if w.admits then return end
  w.admits = true
  local at = w.at
  local budget = match(w.name, '^(.+):')
  if not w.exists and not w.begun then -- perhaps one budget more than the tenant may have
    n_new_budgets = n_new_budgets + 1
    w.surplus = call('ZCOUNT', KEYS[6], text(now_ms), '+inf') + n_new_budgets > sub(ARGV[6], -25, -14) + 0
  end
  -- The first reservation or record in a budget registers its definition. A replica that defines it otherwise is refused
  -- until a migration replaces the registered one. It still settles, since another definition has other windows.
  local definition = ARGV[at + 1]
  if definition ~= '-' or w.exists then
    w.registered = call('HGET', KEYS[5], 'd:' .. budget)
    w.conflict = w.registered and w.registered ~= (definition ~= '-' and definition or w.exists) and w.registered
  end
  w.stale = now_ms < ARGV[at + 2] + 0 or (ARGV[at + 3] ~= '0' and now_ms >= ARGV[at + 3] + 0)
  if not w.limit and definition ~= '-' then w.limit = ARGV[at + 5] end
  if meta[3] then -- run-time limits exist
    local changed = call('HGET', KEYS[2], budget)
    local runtime, until_ms = match(changed or '', '^(%S+) (%d+)')
    if runtime and (until_ms == '0' or tonumber(until_ms) > now_ms) then w.runtime = runtime end
  end
  local limit = w.runtime or w.limit
  w.cap = limit and (tonumber(limit) or CLOSED - 1) -- nil: neither the store nor this replica has one
end

-- Reservations and replays assert their replica's configured limit. The replica that started last, by the store's clock,
-- wins. A claim with a start in the future was made before the clock was set back: the next replica replaces it.
local function assert_limit(w)
  load_limit(w)
  w.asserted = true
  if ARGV[w.at + 6] == '!' and (w.claim < claim or tonumber(match(w.claim, '^%d+')) > now_us) then
    local configured = ARGV[w.at + 5]
    w.asserting, w.claim = true, claim
    w.differs = w.exists and w.limit ~= configured
    w.limit = configured
    w.cap = tonumber(w.runtime or w.limit) or CLOSED - 1
  end
end

-- A replay also restores the window's limit and the budget's definition, which were lost with the window.
local function restore_window(w)
  assert_limit(w)
  w.creating, w.changing, w.registering = true, true, ARGV[w.at + 1] ~= '-'
end

local function deny(w, requested)
  write_due()
  denied_any = true
  local first = call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
  return table.concat({ 'd', w.name, w.runtime or w.limit, text(w.spent + w[SPENT]), text(w.held + w[HELD]),
    text(w.unconfirmed + w[UNCONFIRMED]), requested, first[2] and text(tonumber(first[2])) or '0' }, ' ')
end
