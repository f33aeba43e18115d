-- prelude.lua (part): the request of a batch, its windows, and the changes that finish.lua writes at the end.
--
-- KEYS  1 meta (hash)   2 limits (hash)   3 due (zset)   4 unconfirmed (zset)
--       5 budgets (hash: `w:` and a budget, its last window; `d:` and a budget, its registered definition)
--       6 budgets (zset by the expiry of that window)   7 replicas (zset by the second of their last request)
--       then per window: its hash, its ledger (list)
--       then per operation: the hold record (string)
-- ARGV  1 replica   2 known epoch, or -   3 acknowledged writes
--       4 start of the replica in µs by the store's clock; before the store's first reply its age with a minus sign
--       5 number of windows
--       6 settings: proposed epoch, id memory_ms, retention_ms, and of 12 digits each the most ledger entries, budgets
--         and holds
--       then per window: budget:window, flag, definition, start_ms, end_ms, expires_ms, limit, asserted limit (! or ?)
--         window      the period's name and a fingerprint of the definition, as in keys: 2026-11-30~k3f9a1
--         definition  - if the replica was not given the budget, or defines it otherwise: it only settles there
--       then per operation: a letter and fields; the script of the operation describes them
--
-- The loader combines the parts that a batch needs (ktrdr_budget/engine/protocol/scripts.py): each function costs time at
-- each call, and a lone reservation needs few. docs/wire.md has the grammar of a hold's record.

local gmatch = string.gmatch
local CLOSED = 9007199254740992 -- 2^53: a window whose sum reaches it admits nothing more
local FULL = 4611686018427387904 -- 2^62: a window never counts as much, so that HINCRBY cannot fail (it ends at 2^63)
local RECOVERY_MS = 3000 -- an idle replica checks once a second whether data was lost
local DIGEST = '^[^!|]*!([^.! ]+)%.' -- finds the digest of a request in a record, or in the word of its owner
local LASTING_MS = 315360000000 -- ten years: the life of an open hold's record in windows without end

local now_ms = time[1] * 1000 + (time[2] - time[2] % 1000) / 1000

local meta = call('HMGET', KEYS[1], 'epoch', 'r:' .. ARGV[1], 'limits', 'recovering_until', 'many_holds')
local last_seen = call('ZSCORE', KEYS[7], ARGV[1]) or false

local refused = meta[1] ~= ARGV[2] and schema_error(meta[1])
if refused then return refused end

local epoch, acknowledged, new_second = meta[1] or '-', meta[2] or '0', last_seen ~= time[1]

-- Another epoch, or fewer writes than this store has acknowledged: data was lost (P13). The batch does nothing for a
-- replica that has not noticed yet, and reservations wait until all replicas had time to replay.
if (ARGV[2] ~= '-' and ARGV[2] ~= epoch) or ARGV[3] + 0 > acknowledged + 0 then
  -- A new epoch distinguishes this timeline from the lost one, should that come back: replicas with the epoch of one
  -- replay into the other, even if both count as many writes.
  if epoch == '-' or epoch == ARGV[2] then
    epoch = SCHEMA .. match(ARGV[6], '^%S+')
    call('HSET', KEYS[1], 'epoch', epoch)
  end
  call('HSET', KEYS[1], 'recovering_until', format('%.0f', now_ms + RECOVERY_MS))
  do return now_us_text .. ' L ' .. acknowledged .. ' ' .. epoch end
end
local recovering = meta[4] and meta[4] + 0 > now_ms and meta[4]
if recovering and recovering - now_ms > RECOVERY_MS then -- set before the clock was set back
  recovering = format('%.0f', now_ms + RECOVERY_MS)
  call('HSET', KEYS[1], 'recovering_until', recovering)
end

local dirty, denied_any = false, false -- whether this batch wrote, or denied
local n_windows = ARGV[5] + 0 -- adding 0 converts a text in half the time of tonumber()
local first_hold, first_op = 7 + 2 * n_windows, 6 + 8 * n_windows

-- The changes of a window by HINCRBY, collected in w[HELD], w[SPENT], …; this replica's subtotal of `spent` changes
-- alike (P13).
local HELD, SPENT, UNCONFIRMED, EVENTS, OVERRUNS = 1, 2, 3, 4, 5
local windows = { 0, 0, 0, 0, 0, 0 } -- made with room, as below: growing a table costs more than filling it
for i = 1, n_windows do
  windows[i] = { 0, 0, 0, 0, 0, key = KEYS[6 + 2 * i], ledger = KEYS[7 + 2 * i], name = ARGV[8 * i - 1], at = 8 * i,
    admits = false, asserted = false, asserting = false, changing = false, conflict = false, creating = false,
    differs = false, exists = false, fault = false, gone = false, limit = false, missing = false, registering = false,
    stale = false, surplus = false, claim = '', cap = 0, entries = false, n_entries = 0, stored = 0, held = 0,
    spent = 0, unconfirmed = 0 }
end

-- Read a window once; its totals then follow the batch's own changes.
local function read_window(w)
  local stored, length = redis.pcall('HMGET', w.key, 'def', 'limit', 'asserted', 'spent', 'held', 'unconfirmed'),
    redis.pcall('LLEN', w.ledger)
  w.fault = stored.err or (type(length) == 'table' and length.err)
  if w.fault then return end -- a key of another type fails only the operations on it
  w.exists, w.limit, w.claim = stored[1], stored[2], stored[3] or ''
  w.spent, w.held, w.unconfirmed = stored[4] or 0, stored[5] or 0, stored[6] or 0
  w.stored = w.spent + w.held + w.unconfirmed
  if not w.exists then
    local budget, window = match(w.name, '^(.+):(.+)$')
    local expires_ms = ARGV[w.at + 4] + 0
    w.begun = call('HGET', KEYS[5], 'w:' .. budget)
    -- A replica without a configuration of the budget computes the expiry of its windows only to the day.
    if w.begun == window then expires_ms = tonumber(call('ZSCORE', KEYS[6], budget)) or expires_ms end
    w.gone = expires_ms > 0 and expires_ms <= now_ms
    -- Begun, not expired, and missing: a node of a cluster that was promoted during the migration of its slot has a part
    -- of the keys only, without noticing (Redis before 8 and Valkey before 8 do not inform replicas). A second window
    -- would admit again what the first has spent, so operations on it reply `t` and change nothing.
    w.missing = not w.gone and w.begun == window
  end
end

-- All reads come before the first write: a batch that fails leaves nothing half written.
for i = 1, n_windows do read_window(windows[i]) end
local n_due, n_unconfirmed = call('ZCARD', KEYS[3]), call('ZCARD', KEYS[4])

local due_added, n_added, due_removed = { 0, 0 }, 0, {} -- flat: deadline, id, deadline, id…; ids
local unconfirmed_changes -- id -> key of the record, or false to remove
local operations = {} -- letter -> function(op, key) that returns the reply

local function total(w)
  return w.stored + w[HELD] + w[SPENT] + w[UNCONFIRMED]
end

local function add(w, field, units)
  local sum = w[field] + units
  if (sum >= CLOSED or sum <= -CLOSED) and not w.gone then -- write now, so that the sum of changes stays exact
    local name = field == HELD and 'held' or field == SPENT and 'spent' or 'unconfirmed'
    call('HINCRBY', w.key, name, text(w[field]))
    if field == SPENT then call('HINCRBY', w.key, 'r:' .. ARGV[1], text(w[field])) end
    w[name], w.stored = w[name] + w[field], w.stored + w[field]
    sum = units
  end
  w[field] = sum
end

local function write_due()
  if due_removed[1] then n_due = n_due - call('ZREM', KEYS[3], unpack(due_removed)) end
  if n_added > 0 then n_due = n_due + call('ZADD', KEYS[3], unpack(due_added, 1, n_added)) end
  n_added, due_removed = 0, {}
end
