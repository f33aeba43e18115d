-- cycles.lua: the agent's research cycles, shared by all replicas.
--
-- A record is a line of words, `status started_ms deadline_ms ended_ms reason owner`, followed by the cycle's own document,
-- which this script does not read. A worker that was silent until its deadline has lost its cycle: the next call, of any
-- replica, records that. While the cycle's hold, which has the same id, is open, its deadline is that of the hold: the slot
-- becomes free, and the cycle is lost, at the same instant.
--
-- KEYS   1 active (hash: id to record)   2 ended (hash; `*last`: the id that ended last)   3 order (zset of ended ids by
--        start)   4 due (zset of open holds by deadline_ms)
-- ARGV   1 action   2 ended cycles to keep, at most   3 milliseconds to keep them   then by action, with its result:
--        start  id owner ttl_ms document            now_ms, or '' if the id is in use
--        beat   id owner document                   the status, or '' if the cycle has another owner, or has ended
--        end    id owner status reason document     1; 2 if the cycle had been recorded as lost, which this corrects; 0 if
--                                                   it has another owner, or has ended
--        cancel id                                  the status now, or '' if the id is unknown
--        get    id                                  now_ms and the record, or '' if the id is unknown
--        list   count after                         now_ms, { id, record … } of the active cycles, the same of `count` ended
--                                                   cycles, newest first, that started before the cycle `after`, and of
--                                                   the one that ended last; '' if no ended cycle `after` is recorded
--
-- returns { { id, elapsed_ms … } of the cycles that this call has recorded as lost, the action's result }

local action, kept, kept_ms = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local time = redis.call('TIME')
local now_ms = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))

local function parse(record)
  local status, started, deadline, ended, reason, owner, document =
    string.match(record, '^(%S+) (%d+) (%d+) (%d+) (%S+) (%S+)\n(.*)$')
  return { status = status, started = started, deadline = deadline, ended = ended, reason = reason, owner = owner,
    document = document }
end

local function text(cycle)
  return table.concat({ cycle.status, cycle.started, cycle.deadline, cycle.ended, cycle.reason, cycle.owner }, ' ')
    .. '\n' .. cycle.document
end

local function keep_alive()
  for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], kept_ms) end
end

local function finish(id, cycle, status, reason)
  cycle.status, cycle.reason, cycle.ended = status, reason, now_ms
  redis.call('HDEL', KEYS[1], id)
  redis.call('HSET', KEYS[2], id, text(cycle), '*last', id)
  redis.call('ZADD', KEYS[3], cycle.started, id)
  local surplus = redis.call('ZCARD', KEYS[3]) - kept
  if surplus > 0 then
    local oldest = redis.call('ZRANGE', KEYS[3], 0, surplus - 1)
    redis.call('ZREM', KEYS[3], unpack(oldest))
    redis.call('HDEL', KEYS[2], unpack(oldest))
  end
  keep_alive()
end

-- The deadline of the cycle's hold; nil if that is not open.
local function hold_deadline(id)
  local deadline = redis.call('ZSCORE', KEYS[4], id)
  return deadline and string.format('%.0f', deadline)
end

-- Record lost cycles first, so that the action finds them ended.
local all, active, lost = redis.call('HGETALL', KEYS[1]), {}, {}
for i = 1, #all, 2 do
  local cycle = parse(all[i + 1])
  if tonumber(hold_deadline(all[i]) or cycle.deadline) <= tonumber(now_ms) then
    finish(all[i], cycle, 'failed', 'worker_lost')
    lost[#lost + 1] = all[i]
    lost[#lost + 1] = string.format('%.0f', now_ms - cycle.started)
  else
    active[all[i]] = cycle
  end
end

local actions = {}

function actions.start(id, owner, ttl_ms, document)
  if active[id] then return active[id].owner == owner and active[id].started or '' end
  if redis.call('HEXISTS', KEYS[2], id) == 1 then return '' end
  local deadline = hold_deadline(id) or string.format('%.0f', now_ms + ttl_ms)
  redis.call('HSET', KEYS[1], id, text({ status = 'running', started = now_ms, deadline = deadline, ended = '0',
    reason = '-', owner = owner, document = document }))
  keep_alive()
  return now_ms
end

function actions.beat(id, owner, document)
  local cycle = active[id]
  if not cycle or cycle.owner ~= owner then return '' end
  cycle.deadline, cycle.document = hold_deadline(id) or cycle.deadline, document
  redis.call('HSET', KEYS[1], id, text(cycle))
  keep_alive()
  return cycle.status
end

actions['end'] = function(id, owner, status, reason, document)
  local cycle = active[id]
  if cycle and cycle.owner == owner then
    cycle.document = document
    finish(id, cycle, status, reason)
    return 1
  end
  local record = redis.call('HGET', KEYS[2], id)
  cycle = record and parse(record)
  if cycle and cycle.owner == owner and cycle.reason == 'worker_lost' then
    cycle.document = document
    finish(id, cycle, status, reason)
    return 2
  end
  return 0
end

function actions.cancel(id)
  local cycle = active[id]
  if cycle then
    cycle.status = 'cancelling'
    redis.call('HSET', KEYS[1], id, text(cycle))
    return cycle.status
  end
  local record = redis.call('HGET', KEYS[2], id)
  return record and parse(record).status or ''
end

function actions.get(id)
  return { now_ms, active[id] and text(active[id]) or redis.call('HGET', KEYS[2], id) or '' }
end

function actions.list(count, after)
  local open, ended = {}, {}
  for id, cycle in pairs(active) do
    open[#open + 1] = id
    open[#open + 1] = text(cycle)
  end
  local first = 0
  if after ~= '' then
    local rank = redis.call('ZREVRANK', KEYS[3], after)
    if not rank then return '' end
    first = rank + 1
  end
  if tonumber(count) > 0 then
    local ids = redis.call('ZREVRANGE', KEYS[3], first, first + count - 1)
    for i = 1, #ids do
      ended[2 * i - 1] = ids[i]
      ended[2 * i] = redis.call('HGET', KEYS[2], ids[i]) or ''
    end
  end
  local last = redis.call('HGET', KEYS[2], '*last')
  local record = last and redis.call('HGET', KEYS[2], last)
  return { now_ms, open, ended, record and { last, record } or {} }
end

return { lost, actions[action](unpack(ARGV, 4)) }
