--[[
  Write fields of sessions and remove others, move the sessions between reference sets, and renew them. Make sessions
  that do not exist. Needs expect, move.

  KEYS        for each session: its hash, "rss:{<id>}"; then the reference sets for its new values,
              "rss:<field>:{<value>}"
  ARGV        the stems, then
    mode              "set"; "update" if they must exist; "create" if they are new or an earlier run made them
    expectations      the number of expected fields of each session
    gone              the number of fields to remove from each session, 0 unless the mode is "update"
    sets              for each reference the number of new reference sets of each session, "keep" if its field is
                      neither written nor removed; then for each session
    max_age           milliseconds to live from now on, and after later writes; or "renew": as long as before
    expected          for each field: its name; "holds", "lacks", or "lacks_or_holds"; the data, "" for "lacks"
    values            number of fields and values, then field, value, ...
    gone              the names of the fields to remove

  Returns for each session its TTL in milliseconds; 0 if it was ended, because no field would be left; or
    RSSNOTFOUND       if there is none, and the mode is "update"
    RSSENDED reason   if it was ended, even by this call, as it leaves a set that delete_by_ref works through
    RSSCONFLICT       if it fails an expectation
    RSSIDENTITY       if its identity would change
    RSSLIMIT field    if a reference of that field refuses another session
    RSSBLOCKED until reason field
                      if a value of that field is blocked; the end of the block in milliseconds
]]
local mode, expectations, gone, counts = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), 5
arg = counts + references

-- Whether the fields to remove are all fields that a session has.
local function empties(session, first, last)
  local held, left = session.held, redis.call("HLEN", session.key) - 1
  for i = 3, 4 do
    if held[i] then left = left - 1 end
  end
  for _, value in ipairs(redis.call("HMGET", session.key, unpack(ARGV, first, last))) do
    if value then left = left - 1 end
  end
  return left == 0
end

local function set()
  local name, given, expected = KEYS[key + 1], tonumber(ARGV[arg + 1]), arg + 2
  local first = expected + 3 * expectations + 1
  local last = first + ARGV[first - 1] - 1
  key, arg = key + 1, last + gone
  read_sets(counts)
  spent = spent + 3 + (arg - first) * (arg - first > 256 and 1 or 0.3)

  local session
  if mode ~= "create" or redis.call("EXISTS", name) == 1 then session = find(name) end
  if session and session.ended == ARRIVING and mode ~= "update" then
    discard(session) -- The copy of a session that has expired before it moved.
    session = nil
  end
  if session or mode == "update" then
    local refused = refusal(session)
    if refused then return refused end
    if mode == "create" then return session.ttl end
  end
  session = session or { key = name, held = { string.sub(name, #session_stem + 1, -1 - #ending) } }
  if expectations > 0 and differs(session, expected, expectations) then
    return redis.error_reply("RSSCONFLICT the session has changed")
  end
  if gone > 0 and last < first and empties(session, last + 1, arg) then
    bury(session, "deleted")
    return 0
  end
  local found = session.ttl and settled(session) or 0
  if found == references and session.ttl then
    spread("HSET", session.key, ARGV, first, last)
    spread("HDEL", session.key, ARGV, last + 1, arg)
    return renew(session, given)
  end
  if session.ttl and changes_identity(session) then
    return redis.error_reply("RSSIDENTITY a session keeps its identity")
  end
  local plan = type(found) == "table" and found or plan_move(session, session.held[1], found)
  if plan.err then return plan end

  local ttl = lifetime(session, given)
  enter(plan, session, not session.ttl and name, ttl)
  if session.ttl then
    spread("HSET", session.key, ARGV, first, last)
    spread("HDEL", session.key, ARGV, last + 1, arg)
    undo = false
  else
    if mode ~= "create" and redis.call("EXISTS", name) == 1 then redis.call("UNLINK", name) end
    session.held[3] = now
    redis.call("HSET", name, "id", session.held[1], "_created", now, unpack(ARGV, first, math.min(first + 999, last)))
    spread("HSET", name, ARGV, first + 1000, last)
  end
  expire(session, session.key, given, ttl)
  settle(plan, session, ttl)
  if tell and not session.ttl then tell("created", session.held[1]) end
  return ttl
end

return each(set)
