-- replay_limit.lua: replay a limit that was set or cleared at run time.
--
-- op     REPLAY_LIMIT Q id budget limit until_ms changed_us definition    until_ms is 1 for a cleared limit
-- reply  UNREADABLE y error    the key of the limits is of another type
--        REPLAYED p            the store has a later change, or another definition is registered; nothing was changed
--        GRANTED g             the limit is in force again, or cleared

local function replay_limit(op)
  local budget, limit, until_ms, changed_us, definition = match(op, '^Q %S+ (%S+) (%S+) (%d+) (%d+) (%S+)')
  local stored, registered = redis.pcall('HGET', KEYS[2], budget), call('HGET', KEYS[5], 'd:' .. budget)
  if type(stored) == 'table' then return 'y ' .. stored.err end
  if registered and registered ~= definition then return 'p' end
  if stored and (match(stored, '^%S+ %d+ (%d+)') or 0) + 0 >= changed_us + 0 then return 'p' end
  call('HSET', KEYS[2], budget, limit .. ' ' .. until_ms .. ' ' .. changed_us)
  if until_ms ~= '1' then -- as set_limit.lua sets one
    if not registered then call('HSET', KEYS[5], 'd:' .. budget, definition) end
    if call('PTTL', KEYS[5]) == -1 then call('PEXPIRE', KEYS[5], text(LASTING_MS)) end
    call('HSET', KEYS[1], 'limits', '1')
  end
  return 'g'
end

operations.Q = replay_limit
