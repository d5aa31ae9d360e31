--[[
  Add to an integer field of sessions. Needs session, write.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        the stems, then for each session
    field             its name
    by                the integer to add

  Returns for each session the sum, or its digits if Lua would round it, or
    RSSNOTFOUND       if there is none
    RSSENDED reason   if it was ended
    RSSINTEGER        if the field holds no integer, or the sum does not fit into 64 bits
]]
local function increment()
  key, arg = key + 1, arg + 2
  local session, field, by = find(KEYS[key]), ARGV[arg - 1], ARGV[arg]
  local refused = refusal(session)
  if refused then return refused end
  local sum = redis.pcall("HINCRBY", session.key, field, by)
  if type(sum) == "number" then
    return math.abs(sum) < 2 ^ 53 and sum or redis.call("HGET", session.key, field)
  end
  if string.find(sum.err, "integer") or string.find(sum.err, "overflow") then
    return redis.error_reply("RSSINTEGER the field holds no integer, or the sum does not fit into 64 bits")
  end
  return redis.call("HINCRBY", session.key, field, by) -- This fails again, and ends the batch with the error.
end

return each(increment)
