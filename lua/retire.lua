-- retire.lua: make a hold that is past its deadline unconfirmed. Any replica may send this; it happens once.
--
-- op     RETIRE X id window: …
-- reply  UNREADABLE y error             a key of this request is of another type
--        OTHER_WINDOWS v record         the request lacks windows of the hold
--        MISSING_WINDOW t budget:window    that window was begun, and its key is missing
--        RETIRED x                      the hold is not open, not due, or unconfirmed from now on

local function retire(op, key)
  local id = match(op, '^X (%S+)')
  local hold, reason = find_hold(id, key)
  if hold then return 'x' end
  if not is_unknown(reason) then return reason end
  dirty = true
  set_due(id, false) -- in the index, but without a record: nothing is left to retire
  return 'x'
end

operations.X = retire
