--[[
  Read sessions, and renew those that are to be. Needs _lifetime.lua.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        what _store.lua reads, then
    idle              milliseconds after which they are renewed again, at the latest when half of their time is over;
                      0 for each time, -1 for never; any other negative number only asks whether that is due
    fields            their number, -1 for all; then their names

  Returns for each session field, value, ... with its id, and at last 1 if it was renewed, or that was asked and is due,
  else 0, and its TTL in milliseconds; or
    0, 0              if there is none
    "_ended", reason, 0, 0
                      if it was ended
]]
local idle, count = number(), number()
local fields = count >= 0 and args(count)

-- Renew a session. Returns its TTL; nothing if that is only due now and then, and the server takes no writes at the
-- moment: it can still be read. One that was a master is asked no more.
local function renewed(session)
  local done, ttl = pcall(renew, session, 0)
  if not done and (idle == 0 or string.find(ttl.err or ttl, "READONLY")) then error(ttl, 0) end
  return done and ttl
end

local function get()
  local session = find(key(), not fields)
  if not session then return { 0, 0 } end
  if session.err then return session end
  if session.ended then return { "_ended", session.ended, 0, 0 } end
  local values, bytes = read(session, fields), 0
  for i = 2, #values, 2 do bytes = bytes + #values[i] end
  weigh(bytes)
  local full = idle ~= -1 and lifetime(session, 0)
  local due = idle == 0 or (full and session.ttl + math.min(math.abs(idle), full / 2) <= full)
  local ttl = due and idle >= 0 and renewed(session)
  append(values, due and (ttl or idle < 0) and 1 or 0, ttl or session.ttl)
  return values
end

return each(get)
