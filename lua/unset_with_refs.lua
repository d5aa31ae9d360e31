--[[
  Remove fields of sessions, and move the sessions out of the reference sets of these fields. Needs move.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        the stems, then for each session
    max_age           milliseconds to live from now on, and after later writes; or "renew": as long as before; or
                      "keep": leave its TTL unchanged
    fields            their number, then their names

  Returns for each session field, value, ... of the removed fields, then its TTL in milliseconds; or
    RSSNOTFOUND       if there is none
    RSSENDED reason   if it was ended, even by this call, as it leaves a set that delete_by_ref works through
    RSSIDENTITY       if it would lose its identity
]]
local function unset()
  local given, keep, first = tonumber(ARGV[arg + 1]), ARGV[arg + 1] == "keep", arg + 3
  local last = first + ARGV[arg + 2] - 1
  key, arg = key + 1, last
  local session = find(KEYS[key])
  local refused = refusal(session)
  if refused then return refused end
  spent = spent + 3 + (last - first) * 2

  local taken, removed = {}, {}
  for from = first, last, 1000 do
    local values = redis.call("HMGET", session.key, unpack(ARGV, from, math.min(from + 999, last)))
    for i = 1, #values do
      local field, value = ARGV[from + i - 1], values[i]
      if value and not removed[field] then
        taken[#taken + 1], taken[#taken + 2] = field, value
        spent = spent + #value * 0.015
      end
      removed[field] = true
    end
  end
  for n = 1, references do sets[n] = removed[state[4 + n]] and NONE end
  local found, ttl = settled(session), session.ttl
  if found == references then
    spread("HDEL", session.key, ARGV, first, last)
    taken[#taken + 1] = keep and ttl or renew(session, given)
    return taken
  end
  if changes_identity(session) then return redis.error_reply("RSSIDENTITY a session keeps its identity") end
  local plan = type(found) == "table" and found or plan_move(session, session.held[1], found)
  if plan.err then return plan end

  if not keep then ttl = lifetime(session, given) end
  enter(plan, session, nil, ttl)
  spread("HDEL", session.key, ARGV, first, last)
  undo = false
  if not keep then
    expire(session, session.key, given, ttl)
  end
  settle(plan, session, ttl)
  taken[#taken + 1] = ttl
  return taken
end

return each(unset)
