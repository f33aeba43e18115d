-- read_head.lua (part): the head of a reply to a read, which identifies the state of the store.
--
-- KEYS     1 meta (hash)
-- ARGV     1 replica
-- replies  begin with one text: now_us epoch acknowledged recovering_until_ms
--          epoch                - if nothing was ever written
--          acknowledged         the number of this replica's writes
--          recovering_until_ms  0 if the store is complete
--          A replica with another epoch, or more acknowledged writes, must not use the reply: data was lost
--          (P13).

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'r:' .. ARGV[1], 'recovering_until')
local refused = schema_error(meta[1])
if refused then return refused end
-- A time later than prelude.lua sets dates from before the store's clock was set back.
local recovering_until = math.min(tonumber(meta[3] or '0'), now_ms + 3000)
local head = table.concat({ time[1] .. ('00000' .. time[2]):sub(-6), meta[1] or '-', meta[2] or '0',
  string.format('%.0f', recovering_until > now_ms and recovering_until or 0) }, ' ')
