-- commit.lua: the way of nearly all commits, without the tables that settle.lua needs: an open hold, not due, its budgets
-- in the order of the record. Anything else is sent again as D.
--
-- op     C id window:mode+units …    as D of settle.lua
-- reply  k flags units,units…        done; u unknown id
--        s                           not that simple; nothing was changed

local id_memory_ms = match(ARGV[6], '^%S+ (%d+)')

function operations.C(op, key)
  local record = call('GET', key)
  if not record then return 'u' end
  local id, amounts = match(op, '^C (%S+) (.+)$')
  local deadline, operation, trace, rest = match(record, '^o %a (%d+) %d+ %d+ %S+ (%S+) ([^ |]+)(.+)$')
  if not deadline or deadline + 0 <= now_ms then return 's' end
  local wanted, changes = gmatch(amounts, '(%d+):(%a)(%d+)'), { 0, 0, 0, 0, 0 }
  local n, told, overrun, settled = 0, '', '-', 'c' .. record:sub(2, -#rest - 1)
  for segment, flag, name, reserved, accrued in gmatch(rest, '(|(%a),([^,]+),%d*,(%d+),(%d*),)') do
    local i, mode, amount = wanted()
    local w = i and windows[i + 0]
    if not w or w.name ~= name or w.missing then return 's' end
    if flag == 's' then
      amount = '0'
    elseif mode == 'r' then
      amount = reserved
    elseif mode == 'a' and accrued ~= '' and accrued + 0 > amount + 0 then
      amount = accrued
    end
    local counts, units = reserved + 0, amount + 0
    local over = units > counts
    if over then overrun = 'o' end
    if accrued ~= '' and flag ~= 's' and accrued + 0 > counts then counts = accrued + 0 end
    changes[n + 1], changes[n + 2], changes[n + 3], changes[n + 4], changes[n + 5] = w, counts, over,
      flag ~= 's' and amount, units
    told = (n == 0 and amount) or (told .. ',' .. amount)
    n = n + 5
    settled = settled .. segment .. amount
  end
  -- Nothing has read these windows. The first commit in each gives back at once what was held, which costs nothing, for
  -- else the end of the batch would: where nothing was held, the window may not be here, and nothing may be written.
  for j = 1, n, 5 do
    local w, counts = changes[j], changes[j + 1]
    if not w.stored and not w.here then
      if counts == 0 then
        if call('HLEN', w.key) == 0 then return 's' end
      elseif call('HINCRBY', w.key, 'held', text(-counts)) < 0 and call('HLEN', w.key) == 1 then
        call('HDEL', w.key, 'held')
        return 's'
      end
      w.here, w[HELD] = true, w[HELD] + counts
    end
  end
  local entry = 'commit ' .. id .. ' ' .. operation .. ' ' .. trace
  for j = 1, n, 5 do
    local w, counts, over, amount, units = changes[j], changes[j + 1], changes[j + 2], changes[j + 3], changes[j + 4]
    add(w, HELD, -counts)
    if amount then
      add(w, SPENT, units)
      add(w, EVENTS, 1)
      if over then add(w, OVERRUNS, 1) end
      call('XADD', w.ledger, '*', 'a', amount, 'e', entry)
    end
  end
  due_removed[#due_removed + 1] = id
  dirty = true
  call('SET', key, settled .. ' ' .. ARGV[1], 'PX', id_memory_ms)
  return 'k ' .. overrun .. ' ' .. told
end
