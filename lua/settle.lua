-- settle.lua: commits or releases a hold. Spend is a fact: a commit is never refused for lack of budget, for being late,
-- or for being more than was reserved.
--
-- op     D id window:mode+units …    commit; mode x exactly, r what was reserved, a at least what was accrued
--        M id remark trace window:…  the same; a remark is added to the hold's operation label, a trace replaces its own
--        L id mode window: …         release. Mode 0: by the worker, for good; 1: done by hand, the worker's later commit
--                                    still corrects it; i: by its id, as 1 if the hold is unconfirmed, else as 0;
--                                    s, request: only what was granted to this request, else c; as 1, but the id is
--                                    free again: marked `!`, the worker's extension lifts it, a new grant replaces it;
--                                    f as 0, and an unknown id is taken up as released: a request for it that is
--                                    still under way comes too late
--                                    s does so, too, but for a few minutes only, and in passing (operation `!`): a
--                                    client that is answered `c` with that, and wants the hold, sends u and asks again
-- reply  k flags units,units…    done, in the order of the record; flags: o overrun, l late, or -
--        p flags units,units… replica    the same was done before; of a commit, in that replica's share
--        c record                settled otherwise before, or not a hold
--        u                       unknown id
--        l until_ms              the same while the store recovers: a replica may have yet to replay it
--        v record                windows of the hold are missing in the request
--        t budget:window         that window was begun and is not here; nothing was changed
--        f budget:window         that window would count 2^62 units or more; nothing was changed
--        y error                 a key of this request is of another type; nothing was changed

-- What a commit makes of one segment, as text.
local function actual(segment, modes, values)
  if segment.flag == 's' then return '0' end
  local mode = modes[segment.name]
  if mode == 'r' then return segment.reserved end
  local value = values[segment.name] or '0'
  if mode == 'a' and units(segment.accrued) > tonumber(value) then return segment.accrued end
  return value
end

local function charges(hold)
  local told = {}
  for i = 1, #hold.segments do
    local charged = hold.segments[i].charged
    told[i] = charged == '' and '0' or charged
  end
  return table.concat(told, ',')
end

-- Takes back what a segment counts while it is unsettled; returns that for a charge after expiry, else 0.
local function take_back(hold, segment, w)
  if hold.state == 'o' then
    add(w, HELD, -counted(segment))
    return 0
  end
  local charged = units(segment.charged)
  add(w, UNCONFIRMED, -charged)
  return charged
end

local function leave_indexes(hold, id)
  if hold.state == 'o' then set_due(id, false) else set_unconfirmed(id, false) end
end

-- Commits a hold that was found at these amounts, a text for each of its segments.
local function commit_at(id, key, hold, record, told, operation, trace)
  local state, overrun = hold.state, ''
  if state == 'r' or state == 'n' then return 'c ' .. record end
  if state == 'c' then
    local before = charges(hold)
    return before == table.concat(told, ',') and 'p - ' .. before .. ' ' .. (hold.sharer or '-') or 'c ' .. record
  end
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w = by_name[segment.name]
    local before = state == 'o' and counted(segment) or units(segment.charged)
    if total(w) - before + tonumber(told[i]) >= FULL then return 'f ' .. w.name end
  end
  hold.operation, hold.trace = operation, trace
  local kind = state == 'o' and 'commit' or 'correction'
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w = by_name[segment.name]
    local back = take_back(hold, segment, w)
    if segment.flag ~= 's' then
      local amount = tonumber(told[i])
      spend(w, kind, id, amount, back == 0 and told[i] or text(amount - back), hold)
      if amount > tonumber(segment.reserved) then
        add(w, OVERRUNS, 1)
        overrun = 'o'
      end
    end
    segment.charged = told[i]
  end
  leave_indexes(hold, id)
  local flags = overrun .. (state == 'o' and '' or 'l')
  hold.state, hold.sharer = 'c', sharer
  store_record(key, hold, 'PX', match(ARGV[6], '^%S+ (%d+)'))
  return 'k ' .. (flags == '' and '-' or flags) .. ' ' .. table.concat(told, ',')
end

local function commit(id, key, amounts, remark, trace)
  local hold, record = find(id, key)
  if not hold then return record end
  local modes, values, told = {}, {}, {}
  for i, mode, amount in gmatch(amounts, '(%d+):(%a)(%d+)') do
    local name = windows[tonumber(i)].name
    modes[name], values[name] = mode, amount
  end
  for i = 1, #hold.segments do told[i] = actual(hold.segments[i], modes, values) end
  local operation = hold.operation
  if remark ~= '-' then operation = operation == '-' and remark or operation .. '%20' .. remark end
  return commit_at(id, key, hold, record, told, operation, trace ~= '-' and trace or hold.trace)
end

function operations.D(op, key)
  local id, amounts = match(op, '^D (%S+) (.+)$')
  return commit(id, key, amounts, '-', '-')
end

function operations.M(op, key)
  local id, remark, trace, amounts = match(op, '^M (%S+) (%S+) (%S+) (.+)$')
  return commit(id, key, amounts, remark, trace)
end

-- For how long a request may be under way after its caller has given it up.
local PASSING_MS = 300000

-- An id that the store does not know, and shall know as released.
local function take_up(key, amounts, in_passing)
  local hold = { state = 'r', policy = 'c', deadline = text(now_ms), origin = now_us_text .. ' 0 -',
    operation = in_passing and '!' or '-', trace = '-', segments = {} }
  for i in gmatch(amounts, '(%d+):') do
    local w = windows[tonumber(i)]
    hold.segments[#hold.segments + 1] = { flag = ARGV[w.at], name = w.name, base = '', reserved = '0', accrued = '',
      charged = '' }
  end
  local lasts_ms = in_passing and text(PASSING_MS) or match(ARGV[6], '^%S+ (%d+)')
  if hold.segments[1] then store_record(key, hold, 'PX', lasts_ms) end
  return 'u'
end

-- Releases a hold that was found.
local function release_hold(id, key, hold, record, by_hand)
  local state = hold.state
  if state == 'c' or state == 'n' then return 'c ' .. record end
  if state == 'r' or (state == 'z' and by_hand) then return 'p - ' .. charges(hold) end
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w = by_name[segment.name]
    local back = take_back(hold, segment, w)
    if back > 0 then ledger(w, 'release', id, text(-back), hold.operation, hold.trace) end
    segment.charged = ''
  end
  leave_indexes(hold, id)
  if by_hand then
    hold.state = 'z'
    store_record(key, hold, lifetime(hold)) -- not resolved: the worker may yet come back
  else
    hold.state = 'r'
    store_record(key, hold, 'PX', match(ARGV[6], '^%S+ (%d+)'))
  end
  return 'k ' .. (state == 'o' and '-' or 'l') .. ' ' .. charges(hold)
end

function operations.L(op, key)
  local id, mode, request, amounts = match(op, '^L (%S+) ([01isfu])(%S*)(.*)$')
  if mode == 'u' then
    local record = stored_record(key)
    if record and given_up(record) then
      call('DEL', key)
      dirty = true
    end
    return 'u'
  end
  local hold, record = find(id, key)
  if not hold then
    if not unknown(record) or mode == '0' or mode == '1' or mode == 'i' then return record end
    return take_up(key, amounts, mode == 's')
  end
  if mode == 's' then
    if request_of(hold) ~= request then return 'c ' .. record end
    hold.origin = hold.origin .. '!'
  end
  local by_hand = mode == '1' or mode == 's' or (mode == 'i' and (hold.state == 'x' or hold.state == 'z'))
  return release_hold(id, key, hold, record, by_hand)
end
