--[[
  Renew sessions and their reference sets. Needs session, renew.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        the stems, then for each session
    max_age           milliseconds to live from now on, and after later writes; or "renew": as long as before

  Returns for each session its new TTL in milliseconds, 0 if there is none.
]]
local function touch()
  key, arg = key + 1, arg + 1
  local session = find(KEYS[key])
  if not session or session.ended then return 0 end
  return session.err and session or renew(session, tonumber(ARGV[arg]))
end

return each(touch)
