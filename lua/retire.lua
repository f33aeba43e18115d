-- retire.lua: makes a hold that is past its deadline unconfirmed. Anybody may ask; it happens once.
--
-- op     X id window: …
-- reply  x           done, or not due (any more)
--        v record    windows of the hold are missing in the request
--        y error     a key of this request is of another type

function operations.X(op, key)
  local id = match(op, '^X (%S+)')
  local hold, why = find(id, key)
  if hold or not unknown(why) then return hold and 'x' or why end
  dirty = true
  set_due(id, false) -- due, but the record is gone: nothing is left to retire
  return 'x'
end
