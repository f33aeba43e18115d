-- shrink.lua: what is left of a prepaid slab, told together with what is taken out of it, spend (K or N) or holds (P): in
-- one batch, or after it, so that both never count less than what was granted.
--
-- op     H id window:units …    the hold reserves no more than so much; the least wins, so that a retry is harmless
-- reply  u                      taken note of: there is nothing more to say, whether the hold is known or not
--        l until_ms             unknown while the store recovers: a replica may have yet to replay it
--
-- op     P id policy deadline_ms created_us owner operation trace window:first:reserved:accrued …
--                               a hold that was granted from slabs while this store was away, at first with another
--                               reservation perhaps; unconfirmed if its deadline has passed. It needs no room: the slabs
--                               had it
-- reply  g                      it is open, or unconfirmed, from now on
--        p                      the id is known, and stays as it is
--        t budget:window        of both: that window was begun and is not here; nothing was changed

function operations.H(op, key)
  local id, amounts = match(op, '^H (%S+) (.+)$')
  local hold, why = find_hold(id, key)
  if not hold then return why end
  if hold.state ~= 'o' and hold.state ~= 'x' then return 'u' end
  local left, changed = {}, false
  for i, amount in gmatch(amounts, '(%d+):(%d+)') do left[windows[tonumber(i)].name] = amount end
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w, most = by_name[segment.name], left[segment.name]
    if most and tonumber(most) < tonumber(segment.reserved) then
      local before = hold.state == 'o' and counted_units(segment) or units_of(segment.charged)
      if segment.base == '' then segment.base = segment.reserved end
      segment.reserved, changed = most, true
      if hold.state == 'o' then
        add(w, HELD, counted_units(segment) - before)
      elseif before > tonumber(most) then
        segment.charged = most == '0' and '' or most
        add(w, UNCONFIRMED, tonumber(most) - before)
        add(w, EVENTS, 1)
        -- Not a correction, which resolves: the entries `expiry` of a hold add up to what is unconfirmed of it.
        add_entry(w, 'expiry', id, text(tonumber(most) - before), hold)
      end
    end
  end
  if changed then
    hold.origin = match(hold.origin, '^(%d+) ') .. ' ' .. now_us_text .. ' ' .. match(hold.origin, '(%S+)$')
    store_record(key, hold, 'KEEPTTL')
  end
  return 'u'
end

-- The reservation had arrived after all: it goes on as whoever has it knows it.
local function adopt(id, key, hold, deadline, amounts)
  if (hold.state ~= 'o' and hold.state ~= 'x') or tonumber(deadline) <= now_ms then return 'p' end
  local by_window = {}
  for i = 1, #hold.segments do by_window[hold.segments[i].name] = hold.segments[i] end
  for i, reserved, accrued in gmatch(amounts, '(%d+):%d+:(%d+):(%d+)') do
    local segment = by_window[windows[tonumber(i)].name]
    if segment then
      apply_change(id, hold, segment, change_of(hold, segment, tonumber(accrued), tonumber(reserved)))
    end
  end
  if hold.state == 'x' then set_unconfirmed(id, false) end
  if hold.state == 'x' or tonumber(deadline) > tonumber(hold.deadline) then
    hold.deadline = deadline
    set_due(id, deadline)
  end
  hold.state = 'o'
  store_record(key, hold, kept_expiry(hold))
  return 'g'
end

function operations.P(op, key)
  local id, policy, deadline, created, owner, operation, trace, amounts =
    match(op, '^P (%S+) (%a) (%d+) (%d+) (%S+) (%S+) (%S+) (.+)$')
  local hold, why = find_hold(id, key)
  if hold then return adopt(id, key, hold, deadline, amounts) end
  if not is_unknown(why) then return match(why, '^[ty]') and why or 'p' end
  for i in gmatch(amounts, '(%d+):%d+:%d+:') do
    local w = windows[tonumber(i)]
    if w.fault then return 'y ' .. w.fault end
    if w.missing then return 't ' .. w.name end
  end
  hold = { state = 'o', policy = policy, deadline = deadline, origin = created .. ' ' .. now_us_text .. ' ' .. owner,
    operation = operation, trace = trace, segments = {} }
  for i, first, reserved, accrued in gmatch(amounts, '(%d+):(%d+):(%d+):(%d+)') do
    local w = windows[tonumber(i)]
    restore_window(w)
    local segment = { flag = ARGV[w.at], name = w.name, base = first ~= reserved and first or '', reserved = reserved,
      accrued = accrued == '0' and '' or accrued, charged = '' }
    add(w, HELD, counted_units(segment))
    hold.segments[#hold.segments + 1] = segment
  end
  store_record(key, hold, new_expiry(hold))
  if tonumber(deadline) <= now_ms then
    expire(id, key, hold)
  else
    set_due(id, deadline)
  end
  return 'g'
end
