-- admission.lua: whether a window has room. Reads each window once; its totals then follow the batch's own changes.

-- When this replica started, never later than now, and its id, which decides a tie: texts of as many digits.
local now_us = now_us_text + 0
local start_us = ARGV[4] + 0
if start_us <= 0 then start_us = now_us + start_us end -- an age
local claim = format('%016.0f', math.min(start_us, now_us)) .. ' ' .. ARGV[1]

local unlisted = 0 -- budgets of this batch that the tenant has not had

local function load(w)
  if w.stored then return end
  local at = w.at
  local stored = call('HMGET', w.key, 'def', 'limit', 'asserted', 'spent', 'held', 'unconfirmed')
  local definition, limit = stored[1], stored[2]
  w.exists = definition
  if not definition then -- the first in its window; perhaps of a budget more than the tenant may have
    local last = call('HGET', KEYS[1], 'b:' .. match(w.name, '^(.+):'))
    -- Or it was begun, has not expired, and is not here: a node of a cluster that was promoted while its slot was being
    -- moved has but a part of the keys, and may not know that (Redis before 8, Valkey before 8 do not tell replicas).
    -- A second one would admit what the first has spent: what asks for it is answered `t`, and changes nothing.
    w.missing = last == ARGV[at + 4] .. ' ' .. w.name and (ARGV[at + 4] == '0' or now_ms < ARGV[at + 4] + 0)
    if not last then
      local all = call('HGETALL', KEYS[1])
      unlisted = unlisted + 1
      local listed = unlisted
      for i = 1, #all, 2 do
        local expires = all[i]:sub(1, 2) == 'b:' and match(all[i + 1], '^%d+')
        if expires and (expires == '0' or expires + 0 > now_ms) then listed = listed + 1 end
      end
      w.surplus = listed > match(ARGV[6], '(%d+) %d+$') + 0
    end
  end
  -- The first reservation or record in a budget registers its definition. A replica that defines it otherwise gets
  -- nothing new, until a migration replaces the registered one; its windows are others, so it may settle all the same.
  if ARGV[at + 1] ~= '-' then
    w.registered = call('HGET', KEYS[1], 'd:' .. match(w.name, '^(.+):'))
    w.conflict = w.registered and w.registered ~= ARGV[at + 1] and w.registered
  end
  w.stale = now_ms < ARGV[at + 2] + 0 or (ARGV[at + 3] ~= '0' and now_ms >= ARGV[at + 3] + 0)
  w.limit = limit or ARGV[at + 5]
  w.claim = stored[3] or ''
  w.spent, w.held, w.unconfirmed = stored[4] or 0, stored[5] or 0, stored[6] or 0
  w.stored = w.spent + w.held + w.unconfirmed
  if meta[4] then -- some limit was changed at run time
    local changed = call('HGET', KEYS[2], match(w.name, '^(.+):'))
    local runtime, until_ms = match(changed or '', '^(%S+) (%d+)')
    if runtime and (until_ms == '0' or tonumber(until_ms) > now_ms) then w.runtime = runtime end
  end
  w.cap = tonumber(w.runtime or w.limit) or CLOSED - 1
end

-- All at once, before anything is written: one that cannot be read must not leave half a batch behind.
for i = 1, n_windows do load(windows[i]) end

-- Only reservations assert their configured limit; the replica that started last, by the store's clock, wins. The claim of
-- one that started in the future is from before the clock was set back: the next replica replaces it.
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

local function deny(w, requested)
  store_due()
  denied_any = true
  local first = call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
  return table.concat({ 'd', w.name, w.runtime or w.limit, text(w.spent + w[SPENT]), text(w.held + w[HELD]),
    text(w.unconfirmed + w[UNCONFIRMED]), requested, first[2] and text(tonumber(first[2])) or '0' }, ' ')
end
