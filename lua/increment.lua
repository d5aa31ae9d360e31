--[[
  Add to an integer field of sessions. Needs _session.lua.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        what _store.lua reads, then for each session
    field             its name
    by                the integer to add

  Returns for each session the new value, or
    RSSNOTFOUND       if there is none
    RSSENDED reason   if it was ended
    RSSINTEGER        if the field holds no integer, or the sum is none of 64 bits
]]
local function increment()
  local session, field, by = find(key()), arg(), arg()
  local refused = refusal(session)
  if refused then return refused end
  local sum = redis.pcall("HINCRBY", session.key, field, by)
  if type(sum) == "number" then return sum end
  if string.find(sum.err, "integer") or string.find(sum.err, "overflow") then
    return redis.error_reply("RSSINTEGER the field holds no integer, or the sum is none of 64 bits")
  end
  return redis.call("HINCRBY", session.key, field, by) -- Fails again, for all sessions of the batch.
end

return each(increment)
