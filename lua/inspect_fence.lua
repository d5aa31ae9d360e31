--[[
  Look for what is wrong with fences, and mend it if wanted. Needs sets.

  KEYS        the fences, "rss:_fence:<field>:{<value>}"
  ARGV        the stems, then
    mode              "check", or "mend_and_remove"

  Returns for each fence what was wrong, or an empty text:
    "wrong type"      the key holds another type of data: it is removed
    "endless"         the fence has no TTL: it gets one
]]
local mends = ARGV[3] == "mend_and_remove"

local function inspect_fence()
  key = key + 1
  local name = KEYS[key]
  local size = redis.pcall("HLEN", name)
  if type(size) == "table" then
    surely(size, name)
    wrong_type(size)
    if mends then redis.call("UNLINK", name) end
    return "wrong type"
  end
  if redis.call("PTTL", name) ~= -1 then return "" end
  if mends then redis.call("PEXPIRE", name, tombstone) end
  return "endless"
end

return each(inspect_fence)
