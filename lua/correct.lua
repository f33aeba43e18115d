-- correct.lua: correct a window's counters by the differences that an audit has found.
--
-- Writers change counters, ledger and holds together, by differences. So the error of a counter stays what it was at the
-- audit's snapshot, and is corrected without stopping the writers. Only another correction changes it: the field
-- `corrections` counts these.
--
-- KEYS   1 window (hash)   2 ledger (list)   3 budgets (hash)
-- ARGV   1 the field `corrections` at the snapshot   2 the label of the ledger entry, which names the counters
--        3 the amount that the ledger lacks, or 0   4 budget   then a counter and its difference, for each
-- returns {} after another correction, and nothing was changed; else { 'done', before, after … of each counter }

if (redis.call('HGET', KEYS[1], 'corrections') or '0') ~= ARGV[1] then return {} end
local time, reply = redis.call('TIME'), { 'done' }
local now_us = time[1] .. ('00000' .. time[2]):sub(-6)
for i = 5, #ARGV, 2 do
  reply[#reply + 1] = redis.call('HGET', KEYS[1], ARGV[i]) or '0'
  redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
  reply[#reply + 1] = redis.call('HGET', KEYS[1], ARGV[i])
end
redis.call('HINCRBY', KEYS[1], 'corrections', 1)
if ARGV[3] ~= '0' then redis.call('RPUSH', KEYS[2], now_us .. ' ' .. ARGV[3] .. ' carried - ' .. ARGV[2] .. ' - -') end
redis.call('RPUSH', KEYS[2], now_us .. ' 0 audit - ' .. ARGV[2] .. ' - -')
-- If the window's hash is missing, the next reservation creates it; it must not take it for half moved (prelude.lua).
if redis.call('HEXISTS', KEYS[1], 'def') == 0 then redis.call('HDEL', KEYS[3], 'w:' .. ARGV[4]) end
-- A key that this script has created gets the expiry of the other one.
local window_ms, ledger_ms = redis.call('PTTL', KEYS[1]), redis.call('PTTL', KEYS[2])
if window_ms > 0 and ledger_ms == -1 then redis.call('PEXPIRE', KEYS[2], window_ms) end
if ledger_ms > 0 and window_ms == -1 then redis.call('PEXPIRE', KEYS[1], ledger_ms) end
return reply
