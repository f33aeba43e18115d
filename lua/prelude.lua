-- prelude.lua: the first part of every write script: the request, the store's time, and what is written at the end.
--
-- KEYS  1 meta (hash)   2 limits (hash)   3 due (zset)   4 unconfirmed (zset)
--       5 budgets (hash: `w:` and a name, the budget's last window; `d:` and a name, its registered definition)
--       6 budgets (zset by the expiry of that window)   7 replicas (zset by the second of their last request)
--       then per window: its hash, its ledger (list)
--       then per operation: the hold record (string)
-- ARGV  1 replica   2 known epoch   3 acknowledged writes   5 number of windows
--       4 when the replica started, in µs by this store's clock; before its first reply, which is where it learns that
--         clock, its age instead, with a minus sign
--       6 settings: proposed epoch, id memory_ms, retention_ms, and of 12 digits each: ledger entries at most, budgets at
--         most, holds at most
--       then per window: budget:window, flag, definition, start_ms, end_ms, expires_ms, limit, asserted limit (! or ?)
--         window is the period's name and a fingerprint of the definition, as in keys: 2026-11-30~k3f9a1
--         definition is - where the replica was not given the budget, or defines it otherwise: it only settles there
--       then per operation: a letter and fields; the header of its part says which
--
-- The loader puts together the parts that a batch needs (ktrdr_budget/engine/scripts.py): making a function costs time
-- at each call, and a lone reservation needs few of them.
--
-- A hold record is one string: `state policy deadline_ms created_us grown_us owner operation trace|segment|segment…`
--   state   o open, x expired (unconfirmed), z released by an operator, c committed, r released, n recorded
--   owner   followed by ! and the request that it was granted to, where the caller chose the id; z ends with another ! if
--           it was released because that request's caller was gone
--   policy  c charge, a accrued, r release
--   segment flag,budget:window,base,reserved,accrued,charged     flag: u usd, n count, s slots
--           base is empty if equal to reserved; accrued and charged are empty if 0
-- The last segment of what was committed or recorded is followed by a space and the replica in whose share it is.
-- Empty words are '-'. Amounts are whole units (nano-dollars or counts) below 2^53, where doubles are exact.

local gmatch = string.gmatch
local CLOSED = 9007199254740992 -- 2^53: a window whose sum is here admits nothing more
local FULL = 4611686018427387904 -- 2^62: a window never counts as much, so that HINCRBY cannot fail (it ends at 2^63)
local RECOVERY_MS = 3000 -- an idle replica asks each second whether anything is lost
local LASTING_MS = 315360000000 -- ten years: open holds of windows without end, until somebody sees that they are due

local now_ms = time[1] * 1000 + (time[2] - time[2] % 1000) / 1000

-- Field `r:` counts a replica's acknowledged writes.
local meta = call('HMGET', KEYS[1], 'epoch', 'r:' .. ARGV[1], 'limits', 'recovering_until')
local last_seen = call('ZSCORE', KEYS[7], ARGV[1]) or false

if meta[1] and meta[1] ~= ARGV[2] and meta[1]:sub(1, 2) ~= '3.' then
  return redis.error_reply('KTRDRSCHEMA the store holds data of another schema than 3, which this version reads: '
    .. 'use another tenant (KTRDR_TENANT), or empty the store')
end

local epoch, acknowledged, new_second = meta[1] or '-', meta[2] or '0', last_seen ~= time[1]

-- A store that has another epoch, or counts fewer writes than it acknowledged, has gone back in time (P13). It does nothing
-- for a replica that does not know that yet, and grants nothing to anybody until all had their time to tell what is lost.
if (ARGV[2] ~= '-' and ARGV[2] ~= epoch) or ARGV[3] + 0 > acknowledged + 0 then
  -- From here on it is another timeline than the one that was lost, should that ever come back: whoever knew that one
  -- must tell this one, and the other way round, even if it counts as many writes.
  if epoch == '-' or epoch == ARGV[2] then
    epoch = '3.' .. match(ARGV[6], '^%S+')
    call('HSET', KEYS[1], 'epoch', epoch)
  end
  call('HSET', KEYS[1], 'recovering_until', format('%.0f', now_ms + RECOVERY_MS))
  do return now_us_text .. ' L ' .. acknowledged .. ' ' .. epoch end
end
local recovering = meta[4] and meta[4] + 0 > now_ms and meta[4]
if recovering and recovering - now_ms > RECOVERY_MS then -- it was said before the clock was set back
  recovering = format('%.0f', now_ms + RECOVERY_MS)
  call('HSET', KEYS[1], 'recovering_until', recovering)
end

local dirty, denied_any = false, false -- whether this batch wrote, or denied
local n_windows = ARGV[5] + 0 -- adding 0 makes a number of a text in half the time of tonumber()
local first_hold, first_op = 7 + 2 * n_windows, 6 + 8 * n_windows

-- What changes by HINCRBY at the end of the batch, collected in w[HELD], w[SPENT], …; of `spent`, the share of this
-- replica changes alike (P13).
local HELD, SPENT, UNCONFIRMED, EVENTS, OVERRUNS = 1, 2, 3, 4, 5
local windows = { 0, 0, 0, 0, 0, 0 } -- made with room, here and below: growing a table costs more than filling it
for i = 1, n_windows do
  windows[i] = { 0, 0, 0, 0, 0, key = KEYS[6 + 2 * i], ledger = KEYS[7 + 2 * i], name = ARGV[8 * i - 1], at = 8 * i,
    admits = false, asserted = false, asserting = false, changing = false, conflict = false, creating = false,
    differs = false, exists = false, fault = false, gone = false, limit = false, missing = false, registering = false,
    stale = false, surplus = false, claim = '', cap = 0, entries = false, n_entries = 0, stored = 0, held = 0, spent = 0, unconfirmed = 0 }
end

-- Reads a window, once; its totals then follow the batch's own changes.
local function read(w)
  local stored, entries = redis.pcall('HMGET', w.key, 'def', 'limit', 'asserted', 'spent', 'held', 'unconfirmed'),
    redis.pcall('LLEN', w.ledger)
  w.fault = stored.err or (type(entries) == 'table' and entries.err)
  if w.fault then return end -- a key of another type: only what touches it fails
  w.exists, w.limit, w.claim = stored[1], stored[2], stored[3] or ''
  w.spent, w.held, w.unconfirmed = stored[4] or 0, stored[5] or 0, stored[6] or 0
  w.stored = w.spent + w.held + w.unconfirmed
  if not w.exists then
    local budget, window = match(w.name, '^(.+):(.+)$')
    local expires_ms = ARGV[w.at + 4] + 0
    w.begun = call('HGET', KEYS[5], 'w:' .. budget)
    -- A replica that was not given the budget knows only to the day when its windows expire.
    if w.begun == window then expires_ms = tonumber(call('ZSCORE', KEYS[6], budget)) or expires_ms end
    w.gone = expires_ms > 0 and expires_ms <= now_ms
    -- Begun, not expired, and not here: a node of a cluster that was promoted while its slot was being moved has but a part
    -- of the keys, and may not know that (Redis before 8 and Valkey before 8 do not inform replicas). A second window
    -- would admit what the first has spent, so what asks for it is answered `t`, and changes nothing.
    w.missing = not w.gone and w.begun == window
  end
end

-- All at once, before anything is written: a batch that fails leaves nothing half-written.
for i = 1, n_windows do read(windows[i]) end
local n_due, n_unconfirmed = call('ZCARD', KEYS[3]), call('ZCARD', KEYS[4])

local due_added, n_added, due_removed = { 0, 0 }, 0, {} -- flat: deadline, id, deadline, id…; ids
local unconfirmed_changes -- id -> key of the record, or false to remove
local operations = {}

local function total(w)
  return w.stored + w[HELD] + w[SPENT] + w[UNCONFIRMED]
end

local function add(w, field, units)
  local sum = w[field] + units
  if (sum >= CLOSED or sum <= -CLOSED) and not w.gone then -- the sum of changes stays exact, too
    local name = field == HELD and 'held' or field == SPENT and 'spent' or 'unconfirmed'
    call('HINCRBY', w.key, name, text(w[field]))
    if field == SPENT then call('HINCRBY', w.key, 'r:' .. ARGV[1], text(w[field])) end
    w[name], w.stored = w[name] + w[field], w.stored + w[field]
    sum = units
  end
  w[field] = sum
end

local function store_due()
  if due_removed[1] then n_due = n_due - call('ZREM', KEYS[3], unpack(due_removed)) end
  if n_added > 0 then n_due = n_due + call('ZADD', KEYS[3], unpack(due_added, 1, n_added)) end
  n_added, due_removed = 0, {}
end
