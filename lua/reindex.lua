-- reindex.lua: make the indexes of holds agree with the records of the holds.
--
-- KEYS   1 due (zset)   2 unconfirmed (zset)   then the record of each hold
-- ARGV   the id of each hold
-- returns each change as two words: +due, -due, +unconfirmed or -unconfirmed, and the id

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local reply = {}

-- Give an id this score in an index, or remove it if there is no score.
local function set_score(index, name, id, score)
  local stored = redis.call('ZSCORE', KEYS[index], id)
  if score and (not stored or (index == 1 and tonumber(stored) ~= tonumber(score))) then
    redis.call('ZADD', KEYS[index], score, id)
    reply[#reply + 1] = '+' .. name
  elseif stored and not score then
    redis.call('ZREM', KEYS[index], id)
    reply[#reply + 1] = '-' .. name
  else
    return
  end
  reply[#reply + 1] = id
end

for i = 1, #ARGV do
  local state, deadline = string.match(redis.call('GET', KEYS[2 + i]) or '', '^(%a) %a (%d+) ')
  local expires_ms = state == 'x' and string.format('%.0f', now_ms + redis.call('PTTL', KEYS[2 + i]))
  set_score(1, 'due', ARGV[i], state == 'o' and deadline)
  set_score(2, 'unconfirmed', ARGV[i], expires_ms)
end
return reply
