-- repair.lua: what a replica replays after the store has gone back in time (P13), besides holds (restore.lua) and records.
-- While anybody repairs, reservations wait.
--
-- op     S replica op                      a settlement (K, N) that is in the share of another replica
--        T id window:units                 the share of this replica in the window's spend is at least so much
--        Q id budget limit until_ms changed_us definition     a limit that was set at run time then; one that was cleared
--                                          ended in the first millisecond
-- reply  a               S: that replica has told its share itself; nothing was changed. Else as op
--        k - units       T: so much was missing
--        g               Q: it is in force again, or cleared
--        p               Q: a later change is known, or another definition is registered; nothing was changed
--        t budget:window that window was begun and is not here; nothing was changed
--        f budget:window that window would count 2^62 units or more; nothing was changed
--        y error         a key of this request is of another type; nothing was changed

-- What a replica tells again is much, or its way is long: nothing is granted before it has told all of it.
call('HSET', KEYS[1], 'recovering_until', text(max(now_ms + 1000, recovering and recovering + 0 or 0)))
dirty = true
recovering = nil -- to this batch, what the store does not know is lost

-- Each settlement is in one replica's share, whoever tells of it. The field `t:` of a window tells that a replica has told
-- its share of it, of this timeline: what it has settled is in there, though its id may be beyond its memory.
function operations.S(op, key)
  local replica, settlement = match(op, '^S (%S+) (.+)$')
  local before = {}
  local parts = match(settlement, '^N %S+ %d %S+ %S+(.+)$') or match(settlement, '^K %S+([^\n]+)')
  for i in gmatch(parts, ' (%d+):') do
    local w = windows[tonumber(i)]
    if w then
      if call('HGET', w.key, 't:' .. replica) == epoch then return 'a' end
      before[w] = w[SPENT]
    end
  end
  sharer = replica
  local reply = operations[settlement:sub(1, 1)](settlement, key)
  sharer = ARGV[1]
  for w, units in pairs(before) do
    local moved = w[SPENT] - units
    if moved > 0 then -- the end of the batch will add it to the share of who told it
      call('HINCRBY', w.key, 'r:' .. replica, text(moved))
      call('HINCRBY', w.key, 'r:' .. ARGV[1], text(-moved))
    end
  end
  return reply
end

function operations.T(op)
  local i, units = match(op, '(%d+):(%d+)$')
  local w = windows[tonumber(i)]
  if w.fault then return 'y ' .. w.fault end
  if w.missing then return 't ' .. w.name end
  local lacking = tonumber(units) - tonumber(call('HGET', w.key, 'r:' .. ARGV[1]) or '0') - w[SPENT]
  if total(w) + lacking >= FULL then return 'f ' .. w.name end
  call('HSET', w.key, 't:' .. ARGV[1], epoch)
  if lacking <= 0 then return 'k - 0' end
  repair_window(w)
  add(w, SPENT, lacking)
  add(w, EVENTS, 1)
  ledger(w, 'repair', '-', text(lacking), '-', '-')
  return 'k - ' .. text(lacking)
end

function operations.Q(op)
  local budget, limit, until_ms, changed_us, definition = match(op, '^Q %S+ (%S+) (%S+) (%d+) (%d+) (%S+)')
  local stored, registered = redis.pcall('HGET', KEYS[2], budget), call('HGET', KEYS[5], 'd:' .. budget)
  if type(stored) == 'table' then return 'y ' .. stored.err end
  if registered and registered ~= definition then return 'p' end
  if stored and (match(stored, '^%S+ %d+ (%d+)') or 0) + 0 >= changed_us + 0 then return 'p' end
  call('HSET', KEYS[2], budget, limit .. ' ' .. until_ms .. ' ' .. changed_us)
  if until_ms ~= '1' then -- it was not cleared; as in limits.lua
    if not registered then call('HSET', KEYS[5], 'd:' .. budget, definition) end
    if call('PTTL', KEYS[5]) == -1 then call('PEXPIRE', KEYS[5], text(LASTING_MS)) end
    call('HSET', KEYS[1], 'limits', '1')
  end
  return 'g'
end
