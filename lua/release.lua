-- release.lua: release a hold.
--
-- op     RELEASE L id mode[request] window: …
--        modes: BY_WORKER 0     for good
--               BY_OPERATOR 1   the worker's later commit still corrects it
--               BY_ID i         as BY_OPERATOR if the hold is unconfirmed, else as BY_WORKER
--               FINAL f         as BY_WORKER; an unknown id gets a tombstone, so that its reservation, which may still be
--                               under way, is refused
--               UNRECEIVED s    with the request: only the grant to that request, which its caller did not receive; as
--                               BY_OPERATOR, and the id is free again: an extension by the worker lifts the mark, a new
--                               grant replaces the record. An unknown id gets a tombstone for some minutes
--               LIFT u          remove the tombstone that UNRECEIVED has left, so that the id can be reserved
-- reply  UNREADABLE y error          a key of this request is of another type
--        RECOVERING l until_ms       unknown id while the store recovers: a replica may have yet to replay it
--        UNKNOWN_HOLD u              unknown id; FINAL, UNRECEIVED and LIFT have changed the tombstone
--        OTHER_WINDOWS v record      the request lacks windows of the hold
--        MISSING_WINDOW t budget:window    that window was begun, and its key is missing
--        CONFLICT c record           it was committed, is not a hold, or was granted to another request
--        REPLAYED p - units,units…   released before
--        DONE k flags units,units…   flags: LATE l, or -
--        All but the last change no hold, except that a due one becomes unconfirmed.

local BY_WORKER, BY_OPERATOR, BY_ID, UNRECEIVED, LIFT = '0', '1', 'i', 's', 'u'
-- The time that a request may be under way after its caller has gone.
local IN_FLIGHT_MS = 300000

-- Remember an unknown id as released.
local function write_tombstone(key, amounts, is_temporary)
  local hold = { state = 'r', policy = 'c', deadline = text(now_ms), origin = now_us_text .. ' 0 -',
    operation = is_temporary and '!' or '-', trace = '-', scope = '-', segments = {} }
  for i in gmatch(amounts, '(%d+):') do
    local w = windows[tonumber(i)]
    hold.segments[#hold.segments + 1] = { flag = ARGV[w.at], name = w.name, base = '', reserved = '0', accrued = '',
      charged = '' }
  end
  if hold.segments[1] then store_record(key, hold, 'PX', is_temporary and text(IN_FLIGHT_MS) or id_memory_ms()) end
end

local function lift_tombstone(key)
  local record = read_record(key)
  if record and is_tombstone(record) then
    call('DEL', key)
    dirty = true
  end
end

-- Release a hold that was found.
local function release_hold(id, key, hold, record, is_correctable)
  local state = hold.state
  if state == 'c' or state == 'n' then return 'c ' .. record end
  if state == 'r' or (state == 'z' and is_correctable) then return 'p - ' .. charges_of(hold) end
  for i = 1, #hold.segments do
    local segment = hold.segments[i]
    local w = by_name[segment.name]
    local back = take_back(hold, segment, w)
    if back > 0 then add_entry(w, 'release', id, text(-back), hold) end
    segment.charged = ''
  end
  leave_indexes(hold, id)
  if is_correctable then
    hold.state = 'z'
    store_record(key, hold, kept_expiry(hold)) -- not settled: the worker may still commit
  else
    hold.state = 'r'
    store_record(key, hold, 'PX', id_memory_ms())
  end
  return 'k ' .. (state == 'o' and '-' or 'l') .. ' ' .. charges_of(hold)
end

local function release(op, key)
  local id, mode, request, amounts = match(op, '^L (%S+) ([01isfu])(%S*)(.*)$')
  if mode == LIFT then
    lift_tombstone(key)
    return 'u'
  end
  local hold, record = find_hold(id, key)
  if not hold then
    if not is_unknown(record) or mode == BY_WORKER or mode == BY_OPERATOR or mode == BY_ID then return record end
    write_tombstone(key, amounts, mode == UNRECEIVED)
    return 'u'
  end
  if mode == UNRECEIVED then
    if request_of(hold) ~= request then return 'c ' .. record end
    hold.origin = hold.origin .. '!'
  end
  local is_unconfirmed = hold.state == 'x' or hold.state == 'z'
  local is_correctable = mode == BY_OPERATOR or mode == UNRECEIVED or (mode == BY_ID and is_unconfirmed)
  return release_hold(id, key, hold, record, is_correctable)
end

operations.L = release
