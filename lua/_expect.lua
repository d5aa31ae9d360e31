--[[
  Expectations: the values that fields of a session must hold.

  KEYS        none
  ARGV        for each session
    expected          for each field: its name; "holds", "lacks", or "lacks_or_holds"; the data, "" for "lacks"

  Returns nothing: it stands before the scripts that need it.
]]

-- Whether a session fails its expectations. These begin at ARGV[first].
local function differs(session, first, expectations)
  for i = first, first + 3 * expectations - 1, 3 do
    local held, how = redis.call("HGET", session.key, ARGV[i]), ARGV[i + 1]
    local lacks = not held and how ~= "holds"
    if not lacks and (how == "lacks" or held ~= ARGV[i + 2]) then return true end
  end
  return false
end
