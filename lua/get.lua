--[[
  Read sessions. Needs read.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        the stems, then
    fields            "all", or their number and their names

  Returns for each session field, value, ... with its id, then
    ttl, "alive"      its TTL in milliseconds; or, instead of all these
    reason, "ended"   if it was ended
    "absent"          if there is none
]]
local function get()
  key = key + 1
  local session = find(KEYS[key], all, more)
  return unreadable(session) or describe(read(session), session.ttl, "alive")
end

return each(get)
