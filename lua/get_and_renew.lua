--[[
  Read sessions, and renew those that are due for a renewal. Needs read, renew.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        the stems, then
    fields            "all", or their number and their names
    due               "always"; or "after" and milliseconds: due if so much time, or half of the session's lifetime, has
                      passed since the last renewal; or "check" and milliseconds: only report whether it is due

  Returns for each session field, value, ... with its id, then
    ttl, "alive"      its TTL in milliseconds
    ttl, "renewed"    its new TTL in milliseconds
    ttl, "due"        if a check found it due; or, instead of all these
    reason, "ended"   if it was ended
    "absent"          if there is none
]]
local due, idle = ARGV[arg + 1], tonumber(ARGV[arg + 2])

-- Renew a session and return its TTL. Return nil if the server takes no writes at the moment: the session can still be
-- read, and a later read renews it. With "always" the caller asked for the renewal, so raise the error.
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
