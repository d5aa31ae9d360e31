--[[
  Write copies of sessions of another partition, under other ids. A copy counts as absent until `confirm_with_refs`.
  Needs move.

  KEYS        for each session: the hash of its copy, "rss:{<tag>}:s:<id>"
  ARGV        the stems, then for each session
    copy              the name of what is copied: the same for the same fields, and for no others
    replaces          the name of another copy that this one may replace, "" for none; or "any"
    lives             milliseconds to live until it is confirmed
    before            number of fields and values, then field, value, ... of the references that it has there
    values            number of fields and values, then field, value, ... of the copy, also of fields of ours

  Returns for each session its TTL in milliseconds; or
    a text            the name of another copy, which stays
    RSSCONFLICT       if the id was used otherwise
    RSSLIMIT field    if a reference of that field refuses another session
    RSSBLOCKED until reason field
                      if a value of that field is blocked; the end of the block in milliseconds
]]

-- Return a session with the fields ARGV[first] to ARGV[last].
local function described(first, last)
  local session = { fields = {} }
  for i = first, last do session.fields[i - first + 1] = ARGV[i] end
  return session
end

local function arrive()
  local name, copied, replaces, lives, there = KEYS[key + 1], ARGV[arg + 1], ARGV[arg + 2], ARGV[arg + 3], arg + 5
  local first = there + ARGV[arg + 4] + 1
  local last = first + ARGV[first - 1] - 1
  key, arg = key + 1, last
  spent = spent + 5 + (last - first) * 0.5
  local copy = look(name)
  if copy and copy.ended ~= ARRIVING then return redis.error_reply("RSSCONFLICT the id was used otherwise") end
  if copy then
    local other = copy.held[5 + references]
    if other ~= copied and other ~= replaces and replaces ~= "any" then return other end
  end

  local before, after = described(there, first - 2), described(first, last)
  arrives = {}
  for n = 1, references do
    sets[n] = sets_in(after, n)
    for _, set in ipairs(sets_in(before, n)) do arrives[fence_of(set)] = true end
  end
  -- A copy that was here stays in its sets, or a delete_by_ref that works through one would take it for a new session.
  local session = copy or { key = name, held = { string.sub(name, #session_stem + 1, -1 - #ending) } }
  session.held[3] = nil -- The copy is made now, so its lifetime counts from now.
  local plan = plan_move(session, session.held[1], 0)
  if plan.err then return plan end

  local ttl = lifetime(session, tonumber(lives))
  enter(plan, session, name, ttl)
  redis.call("UNLINK", name) -- The old copy, or a key that is neither a session nor a tombstone.
  session.held[3] = now
  redis.call("HSET", name, "id", session.held[1], "_arriving", copied, "_created", now)
  spread("HSET", name, ARGV, first, last)
  expire(session, name, nil, ttl)
  settle(plan, session, ttl)
  return ttl
end

return each(arrive)
