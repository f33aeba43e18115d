-- schema.lua (part): refuses data of another schema. An epoch begins with the schema of its data.

local SCHEMA = '4.'

-- Return the error for an epoch of another schema.
local function schema_error(epoch)
  if epoch and epoch:sub(1, 2) ~= SCHEMA then
    return redis.error_reply('KTRDRSCHEMA the store holds data of another schema than ' .. SCHEMA:sub(1, 1)
      .. ', which this version reads: use another tenant (KTRDR_TENANT), or empty the store')
  end
end
