-- correct.lua: corrects a window's counters by what a look at it has found them to be off.
--
-- Writers change counters, ledger and holds together, by differences: so a counter that was off by an amount then is off
-- by it now, whatever they have written since, and is corrected without stopping them. Only another correction would have
-- changed that: the field `corrections` counts them.
--
-- KEYS   1 window (hash)   2 ledger (list)   3 budgets (hash)
-- ARGV   1 corrections, as the look has found them   2 a word for the ledger: what is corrected   3 amount that the ledger
--        lacks, '0' if none   4 budget   then counter and difference …
-- returns {} if there was another correction, else { before, after … of each counter }

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
-- A window that has vanished is begun anew by the next reservation (see prelude.lua).
if redis.call('HEXISTS', KEYS[1], 'def') == 0 then redis.call('HDEL', KEYS[3], 'w:' .. ARGV[4]) end
-- What had to be made anew expires with the other.
local window_ms, ledger_ms = redis.call('PTTL', KEYS[1]), redis.call('PTTL', KEYS[2])
if window_ms > 0 and ledger_ms == -1 then redis.call('PEXPIRE', KEYS[2], window_ms) end
if ledger_ms > 0 and window_ms == -1 then redis.call('PEXPIRE', KEYS[1], ledger_ms) end
return reply
