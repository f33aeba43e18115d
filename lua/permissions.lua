-- permissions.lua: which of the commands that are needed this user may not run on a tenant's keys. Runs none of them.
--
-- KEYS   1 a hash   2 a zset   3 a stream   4 a string
-- returns { command … }; nothing where the server cannot tell (before Redis 7.0)

if not redis.acl_check_cmd then return {} end

local hash, zset, stream, string = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local needed = {
  { 'TIME' }, { 'INFO', 'memory' }, { 'MULTI' }, { 'EXEC' }, { 'SCAN', '0' }, { 'EXISTS', hash }, { 'DEL', hash },
  { 'PTTL', hash }, { 'EXPIRE', zset, '1' }, { 'PEXPIRE', hash, '1' }, { 'PEXPIREAT', hash, '1' },
  { 'GET', string }, { 'MGET', string }, { 'SET', string, '' },
  { 'HGET', hash, '' }, { 'HMGET', hash, '' }, { 'HGETALL', hash }, { 'HEXISTS', hash, '' }, { 'HLEN', hash },
  { 'HRANDFIELD', hash, '1' },
  { 'HSET', hash, '', '' }, { 'HDEL', hash, '' }, { 'HINCRBY', hash, '', '0' },
  { 'ZADD', zset, '0', '' }, { 'ZREM', zset, '' }, { 'ZCARD', zset }, { 'ZCOUNT', zset, '0', '0' }, { 'ZSCORE', zset, '' }, { 'ZMSCORE', zset, '' },
  { 'ZRANGE', zset, '0', '0' }, { 'ZREVRANGE', zset, '0', '0' }, { 'ZREVRANK', zset, '' },
  { 'ZRANGEBYSCORE', zset, '0', '0' }, { 'ZREMRANGEBYSCORE', zset, '0', '0' }, { 'ZSCAN', zset, '0' },
  { 'XADD', stream, '*', '', '' }, { 'XDEL', stream, '0' }, { 'XLEN', stream }, { 'XRANGE', stream, '-', '+' },
  { 'XREVRANGE', stream, '+', '-' },
}
local refused = {}
for i = 1, #needed do
  if not redis.acl_check_cmd(unpack(needed[i])) then refused[#refused + 1] = needed[i][1] end
end
return refused
