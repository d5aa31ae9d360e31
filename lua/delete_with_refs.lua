--[[
  End sessions: each leaves its reference sets, and a tombstone under its key. Needs _lifetime.lua.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        what _store.lua reads, then for each session
    reason            what its tombstone will say, "deleted"

  Returns for each session 1, or 0 if there is none.
]]
local function delete()
  local session, reason = find(key()), arg()
  if not session then return 0 end
  if session.err then return session end
  if session.id then bury(session, session.ended or reason) end
  return session.ended and 0 or 1
end

return each(delete)
