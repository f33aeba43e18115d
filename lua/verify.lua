-- verify.lua: one consistent look at a window, to be checked against its ledger and its holds afterwards (P11).
--
-- KEYS   1 due   2 window (hash)   3 ledger (stream)
-- returns { now_us, spent, held, unconfirmed, first entry id, last entry id, { id of every open hold } }
--
-- Ledger entries never change, and a hold record tells when its reservation last grew: so both can be read after this
-- look, page by page, while others write.

local time = redis.call('TIME')
local sums = redis.call('HMGET', KEYS[2], 'spent', 'held', 'unconfirmed')
local first = redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', 1)
local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)
return { string.format('%.0f', time[1] * 1000000 + time[2]), sums[1] or '0', sums[2] or '0', sums[3] or '0',
  first[1] and first[1][1] or '', last[1] and last[1][1] or '', redis.call('ZRANGE', KEYS[1], 0, -1) }
