--[[
  Give sessions a new id, and write fields of them: data, age and references stay. Needs _refs.lua.

  KEYS        for each session: its hash, "rss:{<id>}"; its new hash; then the reference sets for its new values,
              "rss:<field>:{<value>}"
  ARGV        what _store.lua reads, then
    sets              for each reference the number of new reference sets of each session, -1 if its field is not
                      written; then for each session
    id                its new id
    grace             milliseconds for which the old id still leads to it, 0 for none
    max_age           milliseconds to live from now on, and after later writes; -1 to leave its TTL alone
    values            number of fields and values, then field, value, ...

  Returns for each session its TTL in milliseconds, or
    RSSNOTFOUND       if there is none
    RSSENDED reason   if it was ended, also while delete_by_ref works through a set it is in
    RSSLIMIT field    if a reference of that field refuses another session
]]
local counts = read_counts()

local function rotate()
  local old, new, id, grace, max_age = key(), key(), arg(), number(), number()
  local values, sets = args(number()), read_sets(counts)

  local session = look(old)
  if session and session.ended == "rotated" then
    -- Ids are random: if the new one is there, this is the second run of the same call.
    local successor = look(new)
    if successor then return refusal(successor) or successor.ttl end
  end
  local refused = refusal(session)
  if refused then return refused end
  local plan = plan_move(session, id, sets)
  if plan.err then return plan end

  local ttl = max_age > 0 and lifetime(session, max_age) or session.ttl
  enter(plan)
  redis.call("RENAME", old, new)
  append(values, "id", id)
  spread("HSET", new, note(session, max_age, values))
  expire(new, ttl)
  redis.call("HSET", old, "_ended", "rotated")
  if grace > 0 then redis.call("HSET", old, "_next", id, "_until", integer(now + grace)) end
  redis.call("PEXPIRE", old, integer(math.max(tonumber(tombstone), grace)))
  settle(plan, session, ttl)
  return ttl
end

return each(rotate)
