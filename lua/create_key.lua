-- create_key.lua: create an access key.
--
-- KEYS   1 names (zset of equal scores: name and digest of each key)   2 ends (zset: the same, by expires_ms, of keys that
--        expire)   3 the record of this key (string)   4 the log of changes (list)
-- ARGV   1 name and digest   2 rights   3 scope   4 fields that it may set   5 milliseconds until it expires; 0 for never
--        6 keys at most   7 who creates it, and   8 why, as words
-- returns the record: name rights created_ms expires_ms scope may_set    expires_ms is 0 for never
--         taken    another key has this name    full    there are as many keys as may be; nothing was changed
--
-- Removes the names of expired keys, whose records the server removes.

local record = redis.call('GET', KEYS[3])
if record then return record end -- the same request, sent again after its reply was lost

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local name = string.match(ARGV[1], '^%S+')

-- A space sorts before each character of a name, and `!` follows the space.
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], '[' .. name .. ' ', '(' .. name .. '!', 'BYLEX')) do
  local ends_ms = redis.call('ZSCORE', KEYS[2], member)
  if not ends_ms or ends_ms + 0 > now_ms then return 'taken' end
end
local now_text = string.format('%.0f', now_ms)
if redis.call('ZCARD', KEYS[1]) - redis.call('ZCOUNT', KEYS[2], '-inf', now_text) >= ARGV[6] + 0 then return 'full' end

local expires_ms = ARGV[5] == '0' and '0' or string.format('%.0f', now_ms + ARGV[5])
log_change(KEYS[4], 'key', name, ARGV[7], '-', table.concat({ ARGV[2], expires_ms, ARGV[3], ARGV[4] }, ';'), ARGV[8])
local ended
repeat
  ended = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_text, 'LIMIT', '0', '1000')
  if ended[1] then
    redis.call('ZREM', KEYS[1], unpack(ended))
    redis.call('ZREM', KEYS[2], unpack(ended))
  end
until not ended[1]
record = table.concat({ name, ARGV[2], now_text, expires_ms, ARGV[3], ARGV[4] }, ' ')
redis.call('SET', KEYS[3], record)
redis.call('ZADD', KEYS[1], '0', ARGV[1])
if expires_ms ~= '0' then
  redis.call('PEXPIREAT', KEYS[3], expires_ms)
  redis.call('ZADD', KEYS[2], expires_ms, ARGV[1])
end
return record
