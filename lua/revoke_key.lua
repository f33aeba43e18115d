-- revoke_key.lua: revoke an access key.
--
-- KEYS   1 names   2 ends   3 the record of this key   4 the log of changes: as in create_key.lua
-- ARGV   1 name and digest   2 who revokes it, and   3 why, as words
-- returns 1; 0 if the key had expired, or was revoked, as by the same request whose reply was lost

local record = redis.call('GET', KEYS[3])
if record then
  local name, rights, expires_ms, scope, may_set = string.match(record, '^(%S+) (%S+) %S+ (%S+) (%S+) (%S+)$')
  log_change(KEYS[4], 'key', name, ARGV[2], table.concat({ rights, expires_ms, scope, may_set }, ';'), '-', ARGV[3])
  redis.call('DEL', KEYS[3])
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return record and 1 or 0
