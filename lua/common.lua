-- common.lua (part): the store's time and numbers as text, for the scripts that write batches.

local call, format, match, sub = redis.call, string.format, string.match, string.sub

local time = call('TIME')
local now_us_text = time[1] .. sub('00000' .. time[2], -6)

-- Convert a whole number to text. tostring() would turn 15 digits into 1.23e+14.
local function text(number)
  -- '%d' is three times as fast as '%.0f'; below 2^31 it is exact on every platform.
  if number < 2147483648 and number > -2147483648 then return format('%d', number) end
  return format('%.0f', number)
end
