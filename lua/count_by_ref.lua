--[[
  Count the ids in reference sets, including ids of sessions that have expired.

  KEYS        reference sets, "rss:<field>:{<value>}"
  ARGV        the stems

  Returns for each set the number of its ids.
]]
local function count()
  key = key + 1
  return redis.pcall("SCARD", KEYS[key])
end

return each(count)
