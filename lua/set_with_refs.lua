--[[
  Write fields of sessions, move these between reference sets and renew them; make those that are not there.
  Needs _refs.lua.

  KEYS        for each session: its hash, "rss:{<id>}"; then the reference sets for its new values,
              "rss:<field>:{<value>}"
  ARGV        what _store.lua reads, then
    mode              "set"; "update" if they must be there; "create" if they are new, and written already if there
    expectations      how many fields are expected to hold something
    sets              for each reference the number of new reference sets of each session, -1 if its field is not
                      written; then for each session
    max_age           milliseconds to live from now on, and after later writes; 0 for as before
    expected          for each such field its name, and "=" and what it must hold, or "-" and what it may hold if it
                      is there
    values            number of fields and values, then field, value, ...

  Returns for each session its TTL in milliseconds, or
    RSSNOTFOUND       if it is to be updated and there is none
    RSSENDED reason   if it was ended, also if it would leave a set that delete_by_ref works through
    RSSCONFLICT       if a field holds something else than expected
    RSSLIMIT field    if a reference of that field refuses another session
]]
local function conflicts(session, expected)
  for i = 1, #expected, 2 do
    local held = redis.call("HGET", session.key, expected[i])
    local wanted = expected[i + 1]
    local absent = not held and string.sub(wanted, 1, 1) == "-"
    if not absent and (wanted == "-" or held ~= string.sub(wanted, 2)) then return true end
  end
end

local mode, expectations, counts = arg(), number(), read_counts()

local function set()
  local name, max_age = key(), number()
  local expected, values, sets = args(2 * expectations), args(number()), read_sets(counts)

  local session = find(name)
  if session or mode == "update" then
    local refused = refusal(session)
    if refused then return refused end
    if mode == "create" then return session.ttl end
  end
  session = session or { key = name, id = id_of(name) }
  if conflicts(session, expected) then return redis.error_reply("RSSCONFLICT the session has changed") end
  if session.ttl and settled(session, sets) then
    spread("HSET", session.key, values)
    return renew(session, max_age)
  end
  local plan = plan_move(session, session.id, sets)
  if plan.err then return plan end

  local ttl = lifetime(session, max_age)
  enter(plan)
  if not session.ttl and redis.call("EXISTS", name) == 1 then redis.call("DEL", name) end
  if not session.ttl then append(values, "id", session.id) end
  spread("HSET", session.key, note(session, max_age, values))
  expire(session.key, ttl)
  settle(plan, session, ttl)
  return ttl
end

return each(set)
