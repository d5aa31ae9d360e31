--[[
  Read sessions, and renew those that are due. Needs read, renew.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        the stems, then
    fields            "all", or their number and their names
    due               "always"; or "after" and the milliseconds since the last renewal, with half of the session's
                      lifetime as the longest; or "check" and these: only tell whether it is due

  Returns for each session field, value, ... with its id, then
    ttl, "alive"      its TTL in milliseconds
    ttl, "renewed"    the new one
    ttl, "due"        if that was to be checked, and it is; or instead of all that
    reason, "ended"   if it was ended
    "absent"          if there is none
]]
local due, idle = ARGV[arg + 1], tonumber(ARGV[arg + 2])

-- Renew a session. Returns its TTL, or nil if the server takes no writes at the moment: a renewal now and then can
-- wait, and the session can still be read.
local function renewed(session)
  local done, ttl = pcall(renew, session)
  if done then return ttl end
  local text = ttl.err or ttl
  local passes = string.find(text, "OOM") or string.find(text, "NOREPLICAS") or string.find(text, "MISCONF")
  if due == "always" or not passes then error(ttl, 0) end
end

local function get()
  key = key + 1
  local session = find(KEYS[key], all, more)
  local refused = unreadable(session)
  if refused then return refused end
  if not session.held then detail(session) end
  local fields, full = read(session), lifetime(session)
  if due ~= "always" and session.ttl + math.min(idle, full / 2) > full then
    return describe(fields, session.ttl, "alive")
  end
  if due == "check" then return describe(fields, session.ttl, "due") end
  local ttl = renewed(session)
  return describe(fields, ttl or session.ttl, ttl and "renewed" or "alive")
end

return each(get)
