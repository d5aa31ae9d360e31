--[[
  Unblock values: sessions may join them again.

  KEYS        the fences of their reference sets, "rss:_fence:<field>:{<value>}"
  ARGV        the stems

  Returns for each value 1 if it was blocked, else 0.
]]
local function unblock()
  key = key + 1
  local till = redis.pcall("HGET", KEYS[key], "until")
  if type(till) == "table" then return till end
  if not till then return 0 end
  redis.call("HDEL", KEYS[key], "until", "why")
  if redis.call("EXISTS", KEYS[key]) == 1 then redis.call("PEXPIRE", KEYS[key], tombstone) end
  return tonumber(till) > clock() and 1 or 0
end

return each(unblock)
