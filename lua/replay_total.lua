-- replay_total.lua: raise this replica's subtotal of a window to the one in the replica's journal.
--
-- op     REPLAY_TOTAL T id window:units    the subtotal is at least so much
-- reply  UNREADABLE y error             a key of this request is of another type
--        MISSING_WINDOW t budget:window    that window was begun, and its key is missing
--        WINDOW_FULL f budget:window    that window would count 2^62 units or more
--        DONE k - units                 the units that were missing
--        All but the last change nothing.

local NO_LABELS = { operation = '-', trace = '-', scope = '-' }

local function replay_total(op)
  local i, units = match(op, '(%d+):(%d+)$')
  local w = windows[tonumber(i)]
  if w.fault then return 'y ' .. w.fault end
  if w.missing then return 't ' .. w.name end
  local lacking = tonumber(units) - tonumber(call('HGET', w.key, 'r:' .. ARGV[1]) or '0') - w[SPENT]
  if total(w) + lacking >= FULL then return 'f ' .. w.name end
  call('HSET', w.key, 't:' .. ARGV[1], epoch)
  if lacking <= 0 then return 'k - 0' end
  restore_window(w)
  add_spend(w, 'repair', '-', lacking, text(lacking), NO_LABELS)
  return 'k - ' .. text(lacking)
end

operations.T = replay_total
