--[[
  Confirm sessions that have arrived from another partition: write what has changed since they were copied, give them
  their lifetime, and make room for them in sets with a limit. Needs move.

  KEYS        for each session: its hash, "rss:{<tag>}:s:<id>"
  ARGV        the stems, then for each session
    copy              the name of the copy, as `retire_with_refs` returned it
    ttl               milliseconds to live from now on; or "renew": its max_age
    values            number of fields and values, then field, value, ... None of them is a reference
    gone              number of fields to remove, then their names

  Returns for each session its TTL in milliseconds, or
    RSSNOTFOUND       if there is none
    RSSENDED reason   if it was ended
    RSSCONFLICT       if another copy has taken its place
]]
local function confirm()
  local copy, given, first = ARGV[arg + 1], tonumber(ARGV[arg + 2]), arg + 4
  local last = first + ARGV[arg + 3] - 1
  key, arg = key + 1, last + 1 + ARGV[last + 1]
  spent = spent + 3 + (arg - first) * 0.5
  local session = look(KEYS[key])
  if not session or session.ended ~= ARRIVING then
    return refusal(session) or session.ttl -- An earlier run has confirmed it.
  end
  if session.held[5 + references] ~= copy then return redis.error_reply("RSSCONFLICT another copy took its place") end
  for n = 1, references do sets[n] = false end
  local plan = plan_move(session, session.held[1], 0)
  if plan.err then return plan end
  for n = 1, limits and references or 0 do
    local own = limits[n] > 0 and not (refuses and refuses[n]) and sets_in(session, n) or NONE
    for i = 1, #own do
      if redis.call("SCARD", own[i]) > limits[n] then make_room(plan, n, own[i]) end
    end
  end

  local ttl = given or lifetime(session)
  redis.call("HDEL", session.key, "_arriving") -- As the first write, it needs no memory.
  enter(plan, session, nil, ttl)
  spread("HSET", session.key, ARGV, first, last)
  spread("HDEL", session.key, ARGV, last + 2, arg)
  undo = false
  expire(session, session.key, nil, ttl)
  settle(plan, session, ttl)
  return ttl
end

return each(confirm)
