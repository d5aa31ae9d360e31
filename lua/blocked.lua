--[[
  Return how long values stay blocked.

  KEYS        the fences of their reference sets, "rss:_fence:<field>:{<value>}"
  ARGV        the stems

  Returns for each value the milliseconds until its block ends, 0 if it is not blocked.
]]
local function blocked()
  key = key + 1
  local till = redis.pcall("HGET", KEYS[key], "until")
  if type(till) == "table" then return till end
  return math.max(tonumber(till or 0) - clock(), 0)
end

return each(blocked)
