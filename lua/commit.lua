-- commit.lua: the way of nearly all commits, without the tables that settle.lua needs: an open hold, not due, its budgets
-- in the order of the record. Anything else is sent again as D.
--
-- op     C id window:mode+units …    as D of settle.lua
-- reply  k flags units,units…        done; u unknown id
--        s                           not that simple; nothing was changed

function operations.C(op, key)
  local record = call('GET', key)
  if not record then return 'u' end
  local id, amounts = match(op, '^C (%S+) (.+)$')
  local deadline, operation, trace, rest = match(record, '^o %a (%d+) %d+ %d+ %S+ (%S+) ([^ |]+)(.+)$')
  if not deadline or tonumber(deadline) <= now_ms then return 's' end
  local wanted, segments = gmatch(amounts, '(%d+):(%a)(%d+)'), { 0, 0, 0, 0 }
  local n, told, overrun, settled = 0, '', '-', 'c' .. record:sub(2, -#rest - 1)
  for flag, name, base, reserved, accrued in gmatch(rest, '|(%a),([^,]+),(%d*),(%d+),(%d*),') do
    local i, mode, amount = wanted()
    local w = i and windows[tonumber(i)]
    if not w or w.name ~= name then return 's' end
    if flag == 's' then
      amount = '0'
    elseif mode == 'r' then
      amount = reserved
    elseif mode == 'a' and accrued ~= '' and tonumber(accrued) > tonumber(amount) then
      amount = accrued
    end
    local counts, units = tonumber(reserved), tonumber(amount)
    local over = units > counts
    if over then overrun = 'o' end
    if accrued ~= '' and flag ~= 's' and tonumber(accrued) > counts then counts = tonumber(accrued) end
    segments[n + 1], segments[n + 2], segments[n + 3], segments[n + 4] = w, counts, over, flag ~= 's' and amount
    n = n + 4
    told = (n == 4 and amount) or (told .. ',' .. amount)
    settled = settled .. '|' .. flag .. ',' .. name .. ',' .. base .. ',' .. reserved .. ',' .. accrued .. ',' .. amount
  end
  for j = 1, n, 4 do
    local w, counts, over, amount = segments[j], segments[j + 1], segments[j + 2], segments[j + 3]
    add(w, HELD, -counts)
    if amount then
      add(w, SPENT, tonumber(amount))
      add(w, EVENTS, 1)
      if over then add(w, OVERRUNS, 1) end
      call('XADD', w.ledger, '*', 'a', amount, 'e', 'commit ' .. id .. ' ' .. operation .. ' ' .. trace)
    end
  end
  due_removed[#due_removed + 1] = id
  dirty = true
  call('SET', key, settled, 'PX', match(ARGV[6], '^%S+ (%d+)'))
  return 'k ' .. overrun .. ' ' .. told
end
