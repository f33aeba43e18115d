-- prelude.lua: the first part of every write script: the request, the store's time, and what is written at the end.
--
-- KEYS  1 meta (hash)   2 limits (hash)   3 due (zset)   4 unconfirmed (zset)
--       then per window: its hash, its ledger (stream)
--       then per operation: the hold record (string)
-- ARGV  1 replica   2 known epoch   3 acknowledged writes   4 start_us   5 number of windows
--       6 settings: proposed epoch, id memory_ms, retention_ms, ledger entries at most
--       then per window: budget:window, and its descriptor: flag, definition, start_ms, end_ms, expires_ms, limit, and
--       whether that limit is asserted (!) or not (?)
--       then per operation: a letter and fields; the header of its part says which
--
-- The loader puts together the parts that a batch needs (ktrdr_budget/engine/scripts.py): making a function costs time
-- at each call, and a lone reservation needs few of them.
--
-- A hold record is one string: `state policy deadline_ms created_us grown_us owner operation trace|segment|segment…`
--   state   o open, x expired (unconfirmed), z released by an operator, c committed, r released, n recorded
--   policy  c charge, a accrued, r release
--   segment flag,budget:window,base,reserved,accrued,charged     flag: u usd, n count, s slots
--           base is empty if equal to reserved; accrued and charged are empty if 0
-- Empty words are '-'. Amounts are whole units (nano-dollars or counts) below 2^53, where doubles are exact; they become
-- text through %.0f only, because tostring() turns 15 digits into 1.23e+14.

local call, format, match, gmatch = redis.call, string.format, string.match, string.gmatch
local CLOSED = 9007199254740992 -- 2^53: a window whose sum is here admits nothing more

local time = call('TIME')
local now_ms = time[1] * 1000 + (time[2] - time[2] % 1000) / 1000
local now_us_text = time[1] .. format('%06d', time[2])

local meta = call('HMGET', KEYS[1], 'epoch', 'schema', 'r:' .. ARGV[1], 'limits')
if meta[2] and meta[2] ~= '1' then
  return redis.error_reply('KTRDRSCHEMA the store holds data of schema ' .. meta[2] .. ', this client knows 1')
end

local dirty, denied_any = false, false -- whether this batch wrote, or denied
local n_windows = tonumber(ARGV[5])
local first_hold = 4 + 2 * n_windows
local windows = {}
for i = 1, n_windows do
  windows[i] = { key = KEYS[3 + 2 * i], ledger = KEYS[4 + 2 * i], name = ARGV[5 + 2 * i], about = ARGV[6 + 2 * i],
    delta = {} }
end

local due_changes, due_ids = {}, {} -- id -> deadline text, or false to remove; written together at the end
local unconfirmed_changes -- id -> key of the record, or false to remove
local operations = {}

local function text(number)
  return format('%.0f', number)
end

-- Sums change by HINCRBY at the end of the batch. `mine` is this replica's share of `spent` (P13).
local function add(w, field, units)
  local delta = (w.delta[field] or 0) + units
  if delta >= CLOSED or delta <= -CLOSED then -- a sum of deltas stays exact, too
    call('HINCRBY', w.key, field == 'mine' and 'r:' .. ARGV[1] or field, text(delta - units))
    delta = units
  end
  w.delta[field] = delta
  if w[field] then w[field] = w[field] + units end
end

local function set_due(id, deadline)
  if due_changes[id] == nil then due_ids[#due_ids + 1] = id end
  due_changes[id] = deadline
end

local function store_due()
  local added, removed = {}, {}
  for i = 1, #due_ids do
    local id = due_ids[i]
    if due_changes[id] then
      added[#added + 1] = due_changes[id]
      added[#added + 1] = id
    else
      removed[#removed + 1] = id
    end
  end
  if added[1] then call('ZADD', KEYS[3], unpack(added)) end
  if removed[1] then call('ZREM', KEYS[3], unpack(removed)) end
  due_changes, due_ids = {}, {}
end
