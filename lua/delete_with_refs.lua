--[[
  End sessions: each leaves its reference sets, and a tombstone replaces its hash. Needs session, expect, end.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        the stems, then
    expectations      the number of expected fields of each session; then for each session
    reason            the reason in its tombstone, "deleted"
    expected          for each field: its name; "holds", "lacks", or "lacks_or_holds"; the data, "" for "lacks"

  Returns for each session 1 if it was ended; 0 if there is none, or if it fails an expectation. The copy of a session
  that moves is removed: it is no session.
]]
local expectations = tonumber(ARGV[3])
arg = 3

local function delete()
  local reason, expected = ARGV[arg + 1], arg + 2
  key, arg = key + 1, arg + 1 + 3 * expectations
  local session = find(KEYS[key])
  if not session then return 0 end
  if session.err then return session end
  if not session.ttl or differs(session, expected, expectations) then return 0 end
  if session.ended == ARRIVING then
    discard(session)
    return 0
  end
  bury(session, reason_for(session, reason))
  return session.ended and 0 or 1
end

return each(delete)
