--[[
  Take fields out of sessions, and these out of the reference sets of the fields. Needs _refs.lua.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        what _store.lua reads, then for each session
    max_age           milliseconds to live from now on, and after later writes; 0 for as before, -1 for its TTL to stay
    fields            their number, then their names

  Returns for each session field, value, ... of what was taken out, and at last its TTL in milliseconds; or
    RSSNOTFOUND       if there is none
    RSSENDED reason   if it was ended, also if it would leave a set that delete_by_ref works through
]]
local function unset()
  local session, max_age = find(key()), number()
  local fields, removed, sets, taken = args(number()), {}, {}, {}
  local refused = refusal(session)
  if refused then return refused end

  for _, field in ipairs(fields) do
    local value = redis.call("HGET", session.key, field)
    if value and not removed[field] then append(taken, field, value) end
    weigh(value and #value or 0)
    removed[field] = true
  end
  for n, ref in ipairs(refs) do sets[n] = removed[ref.field] and {} end
  if settled(session, sets) then
    spread("HDEL", session.key, fields)
    taken[#taken + 1] = max_age >= 0 and renew(session, max_age) or session.ttl
    return taken
  end
  local plan = plan_move(session, session.id, sets)
  if plan.err then return plan end

  local ttl = max_age >= 0 and lifetime(session, max_age) or session.ttl
  enter(plan)
  spread("HDEL", session.key, fields)
  expire(session.key, ttl)
  spread("HSET", session.key, note(session, max_age, {}))
  settle(plan, session, ttl)
  taken[#taken + 1] = ttl
  return taken
end

return each(unset)
