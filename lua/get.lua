--[[
  Read sessions, and renew those that are to be. Needs _lifetime.lua.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        what _store.lua reads, then
    max_age           milliseconds to renew them for; 0 to leave their TTL alone
    fields            their number, -1 for all; then their names

  Returns for each session field, value, ... with its id, and at last its TTL in milliseconds; or
    0                 if there is none
    "_ended", reason, 0
                      if it was ended
]]
local max_age, count = number(), number()
local fields = count >= 0 and args(count)

local function get()
  local session = find(key(), not fields)
  if not session then return { 0 } end
  if session.err then return session end
  if session.ended then return { "_ended", session.ended, 0 } end
  local values, bytes = read(session, fields), 0
  for i = 2, #values, 2 do bytes = bytes + #values[i] end
  weigh(bytes)
  values[#values + 1] = max_age > 0 and renew(session, max_age) or session.ttl
  return values
end

return each(get)
