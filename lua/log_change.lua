-- log_change.lua (part): write an entry of the log of changes.
--
-- key    the log (list, the oldest entry first). It keeps 10,000 entries.
-- entry  number time_us kind name by before after reason    words of docs/wire.md, - if empty
--        number  from 1 and without gaps, so that the first entry shows the place of any other
--
-- A script calls this before it writes anything else: if the key is of another type, the script fails and has changed
-- nothing. A replay after a data loss logs nothing, because it is no new change.

local function log_change(key, kind, name, by, before, after, reason)
  local last, time = redis.call('LINDEX', key, -1), redis.call('TIME')
  local number = (last and string.match(last, '^%d+') or 0) + 1
  local entry = { string.format('%.0f', number), time[1] .. ('00000' .. time[2]):sub(-6), kind, name, by, before, after,
    reason }
  redis.call('RPUSH', key, table.concat(entry, ' '))
  redis.call('LTRIM', key, -10000, -1)
end
