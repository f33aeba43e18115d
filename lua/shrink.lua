-- shrink.lua: what is left of a prepaid slab, told together with the spend (K or N) that is taken out of it: in one batch,
-- or after it, so that the slab and the spend never count less than what was granted.
--
-- op     H id window:units …    the hold reserves no more than so much; the least wins, so that a retry is harmless
-- reply  u                      taken note of: there is nothing more to say, whether the hold is known or not

function operations.H(op, key)
  local id, amounts = match(op, '^H (%S+) (.+)$')
  local hold, why = find(id, key)
  if not hold then return why == 'u' and 'u' or why end
  if hold.state ~= 'o' and hold.state ~= 'x' then return 'u' end
  local left, changed = {}, false
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do left[windows[tonumber(i)].name] = amount end
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, most = by_name[segment.name], left[segment.name]
    if most and tonumber(most) < tonumber(segment.reserved) then
      local before = hold.state == 'o' and counted(segment) or units(segment.charged)
      if segment.base == '' then segment.base = segment.reserved end
      segment.reserved, changed = most, true
      if hold.state == 'o' then
        add(w, HELD, counted(segment) - before)
      elseif before > tonumber(most) then
        segment.charged = most == '0' and '' or most
        add(w, UNCONFIRMED, tonumber(most) - before)
        add(w, EVENTS, 1)
        -- Not a correction, which resolves: the entries `expiry` of a hold add up to what is unconfirmed of it.
        ledger(w, 'expiry', id, text(tonumber(most) - before), hold.operation, hold.trace)
      end
    end
  end
  if changed then
    hold.origin = match(hold.origin, '^(%d+) ') .. ' ' .. now_us_text .. ' ' .. match(hold.origin, '(%S+)$')
    store_record(key, hold, 'KEEPTTL')
  end
  return 'u'
end
