-- settle_on_behalf.lua: replay a settlement that belongs to the subtotals of another replica.
--
-- Each settlement counts in the subtotals of one replica, regardless of the replica that replays it. A field `t:` of the
-- window records that a replica has replayed its subtotal in this epoch (replay_total.lua). The subtotal includes all
-- that the replica settled, also settlements whose ids it no longer has.
--
-- op     SETTLE_ON_BEHALF S replica op     a RESTORE of a settled hold, or a RECORD
-- reply  OUTGROWN a                        that replica has replayed its subtotal itself; nothing was changed
--        else the reply of the operation

local function settle_on_behalf(op, key)
  local replica, settlement = match(op, '^S (%S+) (.+)$')
  local before = {}
  local parts = match(settlement, '^N %S+ %d %S+ %S+ %S+ %S+(.+)$') or match(settlement, '^K %S+([^\n]+)')
  for i in gmatch(parts, ' (%d+):') do
    local w = windows[tonumber(i)]
    if w then
      if call('HGET', w.key, 't:' .. replica) == epoch then return 'a' end
      before[w] = w[SPENT]
    end
  end
  settling_replica = replica
  local reply = operations[settlement:sub(1, 1)](settlement, key)
  settling_replica = ARGV[1]
  for w, units in pairs(before) do
    local moved = w[SPENT] - units
    if moved > 0 then -- the end of the batch adds it to the subtotals of the replica that sent this
      call('HINCRBY', w.key, 'r:' .. replica, text(moved))
      call('HINCRBY', w.key, 'r:' .. ARGV[1], text(-moved))
    end
  end
  return reply
end

operations.S = settle_on_behalf
