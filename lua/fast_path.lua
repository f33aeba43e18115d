-- fast_path.lua: most reservations and commits: a reservation that fits into existing windows, and a commit of a hold
-- whose record in the store equals the client's copy. Any other operation changes nothing and gets the reply `s`; the
-- client then sends it to the full script. Each client uses the full script once a second in any case, for due holds.
--
-- For speed, this script compares texts of hold records instead of parsing them, stores texts that the client sends, and
-- defines no functions, which would be created at each call. Commits come first in a batch; a later one gets `s`.
--
-- KEYS   1 meta (hash)   2 limits (hash)   3 due (zset)   4 unconfirmed (zset)
--        then per window: its hash, its ledger (list)   then per operation: the hold record (string)
-- ARGV   1 the field of meta that counts this replica's writes   2 known epoch   3 acknowledged writes
--        4 the start of the replica in µs, 16 digits, and its id
--        5 and 6 the start and the end, in µs of 16 digits, of the time in which all windows with reservations are current
--        7 id memory_ms   8 settings, as in prelude.lua   9 number of windows
--        then per window: ! if a reservation of the batch names it, else -
--        then per operation: a line of words, and lines that are used as they are
--
-- op     FAST_COMMIT C id operation trace scope window:counted:units[o] …\nrecord\nsettled record
--          commit the hold with this record; the scope is as ledger entries have it; per window the units that it counts
--          and the units spent (none for slots), with `o` for an overrun. Amounts stay below 2^46: the sums of a batch
--          are exact
--        RESERVE R id ttl_ms policy expires_ms window:units …\nowner operation trace scope|segment|segment…
--          as in reserve.lua
-- reply  NOT_FAST s
--        DONE k        committed
--        GRANTED g
-- returns as finish.lua

local find, byte, pcall = string.find, string.byte, redis.pcall
local KEYS, ARGV = KEYS, ARGV
local TOTAL, CAP, HELD, SPENT, ENTRIES, N_ENTRIES, OVERRUNS = 1, 2, 3, 4, 5, 6, 7
local UNCAPPED = 9007199254740991 -- 2^53 - 1
local FULL = 2305843009213693952 -- 2^61: a batch adds less than 2^53, so the sum stays below the 2^62 of prelude.lua
local COMMIT, END_OF_LINE = 67, 10 -- C, \n
local COUNTED_ALWAYS = 20000

-- Instants of equal length are compared as texts, which is faster. All have as many digits until the year 2286.
local now_us, now_ms = now_us_text, sub(now_us_text, 1, 13)
local settings, n_windows = ARGV[8], ARGV[9] + 0
local first_hold, first_op = 4 + 2 * n_windows, 9 + n_windows
local n_ops, n_commits = #KEYS - first_hold, 0
while n_commits < n_ops and byte(ARGV[first_op + n_commits + 1]) == COMMIT do n_commits = n_commits + 1 end

local reserves = n_commits < n_ops
local meta = reserves and call('HMGET', KEYS[1], 'epoch', ARGV[1], 'recovering_until', 'limits', 'many_holds')
  or call('HMGET', KEYS[1], 'epoch', ARGV[1])
local is_known = meta[1] == ARGV[2] and meta[2] and (meta[2] == ARGV[3] or meta[2] + 0 > ARGV[3] + 0)
local admits = not (meta[3] and meta[3] + 0 > now_ms + 0) and now_us >= ARGV[5] and now_us < ARGV[6]

-- All windows are read before the first write: one that cannot be read must not leave half a batch behind.
local windows = {} -- by number, as text
for i = 1, is_known and n_windows or 0 do
  local key, stored, cap = KEYS[3 + 2 * i], nil, 0
  if ARGV[9 + i] == '!' then
    stored = pcall('HMGET', key, 'def', 'spent', 'held', 'unconfirmed', 'asserted', 'limit')
    local asserted, limit = stored[5], stored[6]
    -- The limit of the replica that started last is in force; a replica that has yet to assert it takes the full script.
    -- So does a window whose definition was replaced: a migration removes `asserted`.
    is_known = limit and asserted and asserted >= ARGV[4]
    if meta[4] and is_known then -- run-time limits exist
      local changed, until_ms = match(call('HGET', KEYS[2], match(key, '^[^}]+}:w:(.+):')) or '', '^(%S+) (%d+)')
      if changed and (until_ms == '0' or until_ms + 0 > now_ms + 0) then limit = changed end
    end
    cap = (limit == '-' and UNCAPPED) or (limit or 0) + 0
  else
    stored = pcall('HMGET', key, 'def', 'spent', 'held', 'unconfirmed')
  end
  is_known = is_known and stored[1] and (n_commits == 0 or type(pcall('LLEN', KEYS[4 + 2 * i])) == 'number')
  if not is_known then break end
  local total = (stored[2] or 0) + (stored[3] or 0) + (stored[4] or 0)
  is_known = total < FULL
  windows[i .. ''] = { total, cap, 0, 0, false, 0, 0 }
end
if not is_known then return now_us .. ' - ' .. ARGV[3] .. ' -' .. string.rep('\ns', n_ops) end

-- The records of the commits. A key in `written` has changed since.
local records, written
if n_commits > 1 then
  records, written = call('MGET', unpack(KEYS, first_hold + 1, first_hold + n_commits)), {}
elseif n_commits == 1 then
  records = { pcall('GET', KEYS[first_hold + 1]) }
end
-- The holds that the tenant may still add. Counting takes a twentieth of a lone reservation's time, so it is left out
-- below half of a large bound; finish.lua counts once a second for each replica.
local holds_left = sub(settings, -12) + 0
if reserves and (meta[5] or holds_left <= COUNTED_ALWAYS) then
  holds_left = holds_left - call('ZCARD', KEYS[3]) - call('ZCARD', KEYS[4])
end

local lines = n_ops > 1 and { '' }
local n_granted, n_settled = 0, 0
local reply, granted, settled -- the last reply; deadline, id, deadline, id …; ids
local ttl_before, deadline, times

for j = 1, n_ops do
  local op, key = ARGV[first_op + j], KEYS[first_hold + j]
  reply = 's'
  if j <= n_commits then
    local label, id, i, counted, units, overrun, at = match(op, '^C ((%S+) %S+ %S+ %S+) (%d+):(%d+):(%d*)(o?)()')
    local words_end = byte(op, at) == END_OF_LINE and at or find(op, '\n', at, true)
    local record_end = find(op, '\n', words_end + 1, true)
    local record = sub(op, words_end + 1, record_end - 1)
    if records[j] == record and sub(record, 5, 17) > now_ms and not (written and written[key]) then
      local others = at < words_end and string.gmatch(sub(op, at, words_end), ' (%d+):(%d+):(%d*)(o?)')
      while i do
        local w = windows[i]
        w[HELD] = w[HELD] - counted
        if units ~= '' then
          local n = w[N_ENTRIES] + 1
          w[SPENT], w[N_ENTRIES] = w[SPENT] + units, n
          if overrun ~= '' then w[OVERRUNS] = w[OVERRUNS] + 1 end
          w[ENTRIES] = w[ENTRIES] or { '' }
          w[ENTRIES][n] = now_us .. ' ' .. units .. ' commit ' .. label
        end
        if others then i, counted, units, overrun = others() else i = nil end
      end
      call('SET', key, sub(op, record_end + 1), 'PX', ARGV[7])
      if written then written[key] = true end
      n_settled, settled, reply = n_settled + 1, settled or {}, 'k'
      settled[n_settled] = id
    end
  elseif admits and holds_left > 0 then
    local id, ttl, policy, expires, i, units, at = match(op, '^R (%S+) (%S+) (%a) (%d+) (%d+):(%d+)()')
    local words_end = byte(op, at) == END_OF_LINE and at or find(op, '\n', at, true)
    local w = windows[i]
    local fits = w[TOTAL] + w[HELD] + w[SPENT] + units <= w[CAP]
    local others
    if at < words_end then
      others = sub(op, at, words_end)
      for k, more in string.gmatch(others, ' (%d+):(%d+)') do
        local v = windows[k]
        fits = fits and v[TOTAL] + v[HELD] + v[SPENT] + more <= v[CAP]
      end
    end
    if fits then
      if ttl ~= ttl_before then
        ttl_before, deadline = ttl, format('%.0f', now_ms + ttl)
        times = ' ' .. deadline .. ' ' .. now_us .. ' 0 '
      end
      if call('SET', key, 'o ' .. policy .. times .. sub(op, words_end + 1), 'NX', 'PXAT', expires) then
        w[HELD] = w[HELD] + units
        if others then
          for k, more in string.gmatch(others, ' (%d+):(%d+)') do windows[k][HELD] = windows[k][HELD] + more end
        end
        holds_left, granted, reply = holds_left - 1, granted or {}, 'g'
        granted[n_granted + 1], granted[n_granted + 2] = deadline, id
        n_granted = n_granted + 2
      end
    end
  end
  if lines then lines[j + 1] = reply end
end

local acknowledged = ARGV[3]
if granted or settled then
  for i = 1, n_windows do
    local w, key = windows[i .. ''], KEYS[3 + 2 * i]
    local n_entries, spent = w[N_ENTRIES], w[SPENT]
    if w[HELD] ~= 0 then call('HINCRBY', key, 'held', text(w[HELD])) end
    if spent ~= 0 then
      spent = text(spent)
      call('HINCRBY', key, 'spent', spent)
      call('HINCRBY', key, ARGV[1], spent)
    end
    if w[OVERRUNS] ~= 0 then call('HINCRBY', key, 'overruns', text(w[OVERRUNS])) end
    if n_entries > 0 then
      local ledger_key = KEYS[4 + 2 * i]
      call('HINCRBY', key, 'events', text(n_entries))
      local length, length_max = call('RPUSH', ledger_key, unpack(w[ENTRIES], 1, n_entries)), sub(settings, -38, -27) + 0
      if length == n_entries then -- the first entries
        local ttl_ms = call('PTTL', key)
        if ttl_ms > 0 then call('PEXPIRE', ledger_key, ttl_ms) end
      end
      if length > length_max then
        -- include: trim_ledger.lua
      end
    end
  end
  if settled then call('ZREM', KEYS[3], unpack(settled)) end
  if granted then call('ZADD', KEYS[3], unpack(granted, 1, n_granted)) end
  acknowledged = call('HINCRBY', KEYS[1], ARGV[1], 1)
end
local head = now_us .. ' - ' .. acknowledged .. ' -'
if not lines then return head .. '\n' .. reply end
lines[1] = head
return table.concat(lines, '\n')
