-- read_head.lua: the first part of the scripts that read: which state of the store their reply shows.
--
-- KEYS     1 meta
-- ARGV     1 replica
-- replies  begin with one text: now_us epoch acknowledged recovering_until_ms
--          epoch is - if nothing was ever written, acknowledged counts this replica's writes; a client that knows another
--          epoch, or more writes, must not believe the reply (P13). recovering_until_ms is 0 if the store is complete

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'r:' .. ARGV[1], 'recovering_until')
if meta[1] and meta[1]:sub(1, 2) ~= '3.' then
  return redis.error_reply('KTRDRSCHEMA the store holds data of another schema than 3, which this version reads: '
    .. 'use another tenant (KTRDR_TENANT), or empty the store')
end
-- At most as long as prelude.lua sets it: it may have been set before the clock was set back.
local recovering_until = math.min(tonumber(meta[3] or '0'), now_ms + 3000)
local head = table.concat({ time[1] .. ('00000' .. time[2]):sub(-6), meta[1] or '-', meta[2] or '0',
  string.format('%.0f', recovering_until > now_ms and recovering_until or 0) }, ' ')
