--[[
  Give sessions a new id, write some of their fields, and remove others. All else stays. Needs move.

  KEYS        for each session: its hash, "rss:{<id>}"; its new hash; then the reference sets for its new values,
              "rss:<field>:{<value>}"
  ARGV        the stems, then
    gone              the number of fields to remove from each session
    sets              for each reference the number of new reference sets of each session, "keep" if its field is
                      neither written nor removed; then for each session
    id                its new id
    grace             milliseconds for which the old id still leads to it, if its identity stays; or "none"
    max_age           milliseconds to live from now on, and after later writes; or "renew": as long as before; or
                      "keep": leave its TTL unchanged
    values            number of fields and values, then field, value, ...
    gone              the names of the fields to remove

  Returns for each session its TTL in milliseconds, or
    RSSNOTFOUND       if there is none
    RSSENDED reason   if it was ended, even by this call, while delete_by_ref works through one of its sets
    RSSLIMIT field    if a reference of that field refuses another session
    RSSBLOCKED until reason field
                      if a value of that field is blocked; the end of the block in milliseconds
]]
local gone, counts = tonumber(ARGV[3]), 3
arg = counts + references

local function rotate()
  local old, new, id = KEYS[key + 1], KEYS[key + 2], ARGV[arg + 1]
  local grace, given, first = tonumber(ARGV[arg + 2]), tonumber(ARGV[arg + 3]), arg + 5
  local keep, last = ARGV[arg + 3] == "keep", first + ARGV[arg + 4] - 1
  key, arg = key + 2, last + gone
  read_sets(counts)
  spent = spent + 5 + (arg - first) * (arg - first > 256 and 1 or 0.3)

  local session = look(old)
  if session and session.ended == "rotated" then
    -- Ids are random. So if a session has the new id, this is the second run of the same call.
    local successor = look(new)
    if successor then return refusal(successor) or successor.ttl end
  end
  local refused = refusal(session)
  if refused then return refused end
  local plan = plan_move(session, id, 0)
  if plan.err then return plan end
  -- An attacker may have planted the old id before this login. It must not lead to the session afterwards.
  if changes_identity(session) then grace = nil end

  local ttl = keep and session.ttl or lifetime(session, given)
  enter(plan, session, nil, ttl)
  redis.call("RENAME", old, new)
  local leave_sets = undo
  undo = function()
    redis.pcall("RENAME", new, old)
    leave_sets()
  end
  redis.call("HSET", new, "id", id, unpack(ARGV, first, math.min(first + 999, last)))
  spread("HSET", new, ARGV, first + 1000, last)
  spread("HDEL", new, ARGV, last + 1, arg)
  undo = false
  if not keep then
    expire(session, new, given, ttl)
  elseif not session.held[3] then
    redis.call("HSET", new, "_created", now)
  end
  if grace then
    entomb(old, math.max(tombstone, grace), "rotated", "_next", id, "_until", now + grace)
  else
    entomb(old, tombstone, "rotated")
  end
  settle(plan, session, ttl)
  if tell then tell("rotated", session.held[1], id) end
  return ttl
end

return each(rotate)
