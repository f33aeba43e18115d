-- readiness.lua: try each command that the product needs, on keys that it removes, and name the refused ones.
--
-- KEYS   1 a hash   2 a zset   3 a list   4 a string: keys of the tenant for this script only
-- returns { command, error, command, error … }; an error is empty if the store's user lacks the permission
--
-- From Redis 7.0, permissions are checked before any command runs: without DEL, a trial would leave its keys behind.

local hash, zset, list, string = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local outside = { { 'INFO', 'memory' }, { 'MULTI' }, { 'EXEC' }, { 'SCAN', '0' } } -- not run by scripts
-- The first write, since a server checks for full memory only before a script has written. Its key expires.
local first = { { 'SET', string, '', 'PX', '1000' } }
local removing = { { 'DEL', hash, zset, list, string }, { 'PEXPIRE', hash, '1000' } }
local writing = {
  { 'TIME' }, { 'EXISTS', hash }, { 'PTTL', hash },
  { 'GET', string }, { 'MGET', string },
  { 'HSET', hash, 'a', '0' }, { 'HINCRBY', hash, 'a', '1' }, { 'HGET', hash, 'a' }, { 'HMGET', hash, 'a' },
  { 'HGETALL', hash }, { 'HEXISTS', hash, 'a' }, { 'HLEN', hash }, { 'HRANDFIELD', hash }, { 'HDEL', hash, 'b' },
  { 'PEXPIREAT', hash, '9999999999999' },
  { 'ZADD', zset, '0', 'a' }, { 'ZCARD', zset }, { 'ZCOUNT', zset, '0', '0' },
  { 'ZSCORE', zset, 'a' }, { 'ZMSCORE', zset, 'a' },
  { 'ZRANGE', zset, '0', '0' }, { 'ZREVRANGE', zset, '0', '0' }, { 'ZREVRANK', zset, 'a' },
  { 'ZRANGEBYSCORE', zset, '0', '0' }, { 'ZREMRANGEBYSCORE', zset, '1', '1' }, { 'ZSCAN', zset, '0' },
  { 'ZREM', zset, 'b' }, { 'EXPIRE', zset, '1' },
  { 'RPUSH', list, 'a' }, { 'LPUSH', list, 'b' }, { 'LLEN', list }, { 'LINDEX', list, '0' },
  { 'LRANGE', list, '0', '-1' }, { 'LTRIM', list, '1', '-1' },
}

local refused = {}

local function note(command, words)
  refused[#refused + 1] = command[1]
  refused[#refused + 1] = words
end

if redis.acl_check_cmd then
  for _, commands in ipairs({ outside, first, removing, writing }) do
    for _, command in ipairs(commands) do
      local known, allowed = pcall(redis.acl_check_cmd, unpack(command))
      if not known then note(command, 'unknown command') elseif not allowed then note(command, '') end
    end
  end
end

for _, commands in ipairs({ first, removing, writing }) do
  if refused[1] then return refused end
  for _, command in ipairs(commands) do
    local reply = redis.pcall(unpack(command))
    if type(reply) == 'table' and reply.err then note(command, reply.err) end
  end
end
redis.call(unpack(removing[1]))
return refused
