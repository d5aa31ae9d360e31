--[[
  Renew sessions and the reference sets they are in. Needs _lifetime.lua.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        what _store.lua reads, then for each session
    max_age           milliseconds to renew it for, now and later; 0 for as before

  Returns for each session its new TTL in milliseconds, 0 if there is none.
]]
local function touch()
  local session, max_age = find(key()), tonumber(arg())
  if not session or session.ended then return 0 end
  return session.err and session or renew(session, max_age)
end

return each(touch)
