-- fast_path.lua: the way of nearly all reservations and commits, without what others need: reservations that fit, in windows
-- that exist as their client knows them; commits of holds whose record is what their client was told. Whatever is not
-- that simple is answered `s`. Nothing is changed for it, and it is sent again to the script that knows everything, which
-- each client asks once a second besides: about holds that are due, and to be known as alive.
--
-- KEYS   1 meta (hash)   2 limits (hash)   3 due (zset)   4 unconfirmed (zset)
--        then per window: its hash, its ledger (list)   then per operation: the hold record (string)
-- ARGV   1 the field of meta that counts this replica's writes   2 known epoch   3 acknowledged writes
--        4 when it started, in µs of 16 digits, and its id
--        5 and 6 from when until when, in µs of 16 digits, all windows that are reserved in are the current ones
--        7 id memory_ms   8 settings, as in prelude.lua   9 number of windows
--        then per window: ! if something is reserved in it, else -
--        then per operation: a line of words, and lines that are taken as they are
--
-- op     C id operation trace window:counted:units window:counted:unitso …\nrecord\nsettled record
--                    commits the hold with this record; per window what it counts and what it costs (nothing for slots),
--                    and o if that is more than was reserved. Amounts below 2^46: the sums of a batch are exact.
--        R id ttl_ms policy expires_ms window:units window:units …\nowner operation trace|segment|segment…
--                    reserves; as in reserve.lua
-- reply  k           committed
--        g           granted
--        s           not that simple
-- returns as finish.lua

local gmatch, find = string.gmatch, string.find
local TOTAL, CAP, HELD, SPENT, EVENTS, OVERRUNS, ENTRIES = 1, 2, 3, 4, 5, 6, 7 -- of a window: as stored, its limit, and what changes
local UNCAPPED = 9007199254740991 -- 2^53 - 1
local FULL = 2305843009213693952 -- 2^61: a batch adds less than 2^53, so that it stays below the 2^62 of prelude.lua

local now_us = now_us_text
local now_ms = sub(now_us, 1, 13)
local n_windows = ARGV[9] + 0
local first_hold, first_op = 4 + 2 * n_windows, 9 + n_windows

local meta = call('HMGET', KEYS[1], 'epoch', ARGV[1], 'recovering_until', 'limits')
local usual = meta[1] == ARGV[2] and meta[2] and (meta[2] == ARGV[3] or meta[2] + 0 > ARGV[3] + 0)
local n_holds = call('ZCARD', KEYS[3]) + call('ZCARD', KEYS[4])
-- Numbers are compared as numbers. Only instants of 16 digits (now_us, ARGV[5], ARGV[6]) are compared as texts, which is
-- faster, and the same where all have as many digits: until the year 2286.
local admits = not (meta[3] and meta[3] + 0 > now_ms + 0) and now_us >= ARGV[5] and now_us < ARGV[6]
  and n_holds + #KEYS - first_hold <= sub(ARGV[8], -12) + 0

-- All windows are read before anything is written: one that cannot be read must not leave half a batch behind.
local windows = { 0 }
for i = 1, usual and n_windows or 0 do
  local key = KEYS[3 + 2 * i]
  local stored = redis.pcall('HMGET', key, 'def', 'spent', 'held', 'unconfirmed', 'asserted', 'limit')
  local entries = redis.pcall('LLEN', KEYS[4 + 2 * i])
  local asserted, limit = stored[5], stored[6]
  usual = usual and stored[1] and type(entries) == 'number'
  if ARGV[9 + i] == '!' then
    -- The limit of the replica that started last is in force; one that has yet to say so is not simple. Nor is a window
    -- whose definition was replaced by a migration: that removes `asserted`.
    usual = usual and limit and asserted and asserted >= ARGV[4]
    if meta[4] and usual then -- some limit was changed at run time
      local changed, until_ms = match(call('HGET', KEYS[2], match(key, '^[^}]+}:w:(.+):')) or '', '^(%S+) (%d+)')
      if changed and (until_ms == '0' or until_ms + 0 > now_ms + 0) then limit = changed end
    end
  end
  if usual then
    local total = (stored[2] or 0) + (stored[3] or 0) + (stored[4] or 0)
    usual = total < FULL
    windows[i] = { total, (not limit and 0) or (limit == '-' and UNCAPPED) or limit + 0, 0, 0, 0, 0, {} }
  end
end

local lines, n_granted, n_settled = { '', '' }, 0, 0
local granted, settled = { 0, 0 }, { 0 } -- deadline, id, deadline, id …; ids
local asked = { 0, 0 } -- by one reservation: window, units, window, units …
local ttl_before, deadline, beginning

for j = 1, #KEYS - first_hold do
  local op, key, reply = ARGV[first_op + j], KEYS[first_hold + j], 's'
  local words_end = find(op, '\n', 1, true)
  if not usual then
    -- Nothing is.
  elseif op:byte() == 67 then -- C
    local label, id, parts_at = match(op, '^C ((%S+) %S+ %S+)()')
    local record_end = find(op, '\n', words_end + 1, true)
    local record = sub(op, words_end + 1, record_end - 1)
    if redis.pcall('GET', key) == record and sub(record, 5, 17) + 0 > now_ms + 0 then
      for i, counted, units, over in gmatch(sub(op, parts_at, words_end), ' (%d+):(%d+):(%d*)(o?)') do
        i = i + 0
        local w = windows[i]
        w[HELD] = w[HELD] - counted
        if units ~= '' then
          w[SPENT], w[EVENTS] = w[SPENT] + units, w[EVENTS] + 1
          if over ~= '' then w[OVERRUNS] = w[OVERRUNS] + 1 end
          w[ENTRIES][w[EVENTS]] = now_us .. ' ' .. units .. ' commit ' .. label .. ' -'
        end
      end
      call('SET', key, sub(op, record_end + 1), 'PX', ARGV[7])
      n_settled = n_settled + 1
      settled[n_settled], reply = id, 'k'
    end
  elseif admits then -- R
    local id, ttl, policy, expires, parts_at = match(op, '^R (%S+) (%S+) (%a) (%d+)()')
    local fits, m = true, 0
    for i, units in gmatch(sub(op, parts_at, words_end), ' (%d+):(%d+)') do
      local w = windows[i + 0]
      fits = fits and w[TOTAL] + w[HELD] + w[SPENT] + units <= w[CAP]
      asked[m + 1], asked[m + 2] = w, units
      m = m + 2
    end
    if ttl ~= ttl_before then
      ttl_before, deadline = ttl, format('%.0f', now_ms + ttl)
      beginning = ' ' .. deadline .. ' ' .. now_us .. ' 0 '
    end
    if fits and call('SET', key, 'o ' .. policy .. beginning .. sub(op, words_end + 1), 'NX', 'PXAT', expires) then
      granted[n_granted + 1], granted[n_granted + 2], reply = deadline, id, 'g'
      n_granted = n_granted + 2
      for k = 1, m, 2 do asked[k][HELD] = asked[k][HELD] + asked[k + 1] end
    end
  end
  lines[j + 1] = reply
end

local acknowledged = ARGV[3]
if n_granted + n_settled > 0 then
  for i = 1, n_windows do
    local w, key = windows[i], KEYS[3 + 2 * i]
    local events = w[EVENTS]
    if w[HELD] ~= 0 then call('HINCRBY', key, 'held', text(w[HELD])) end
    if w[OVERRUNS] ~= 0 then call('HINCRBY', key, 'overruns', text(w[OVERRUNS])) end
    if w[SPENT] ~= 0 then
      local spent = text(w[SPENT])
      call('HINCRBY', key, 'spent', spent)
      call('HINCRBY', key, ARGV[1], spent)
    end
    if events ~= 0 then
      local ledger = KEYS[4 + 2 * i]
      call('HINCRBY', key, 'events', text(events))
      if append(key, ledger, w[ENTRIES], events, ARGV[8]) then -- its first entries
        local ttl_ms = call('PTTL', key)
        if ttl_ms > 0 then call('PEXPIRE', ledger, ttl_ms) end
      end
    end
  end
  if n_settled > 0 then call('ZREM', KEYS[3], unpack(settled)) end
  if n_granted > 0 then call('ZADD', KEYS[3], unpack(granted, 1, n_granted)) end
  acknowledged = call('HINCRBY', KEYS[1], ARGV[1], 1)
end
lines[1] = now_us .. ' - ' .. acknowledged .. ' -'
return table.concat(lines, '\n')
