--[[
  How long sessions and their reference sets live, and how they end. Needs _store.lua and _session.lua.

  KEYS        none
  ARGV        none

  Returns nothing: the loader puts it in front of the scripts that need it.
]]

-- By the clock, not from the moment of the command: where time runs on in a script, a set would die before its session.
-- Redis writes a number of Lua with all of its digits, up to 2^53.
local function expire(name, ttl) redis.call("PEXPIREAT", name, now + ttl) end

-- A set lives at least as long as its members, and somewhat longer: so it need not be renewed with each of them, each
-- time. One without a TTL, made by others, keeps none; -2: it was not there.
local function outlive(set, ttl, before)
  if before == -2 or (before >= 0 and before < ttl) then expire(set, ttl + math.floor(ttl / 32)) end
end

-- What a session that is given max_age has left to live.
local function lifetime(session, max_age)
  if max_lifetime == 0 then return max_age end
  return math.min(max_age, (session.created or now) + max_lifetime - now)
end

-- Let a session live on, and with it the sets it is in. Returns what it has left to live.
local function renew(session, max_age)
  local ttl = lifetime(session, max_age)
  for n = 1, #refs do
    local sets = sets_in(session, n)
    for i = 1, #sets do outlive(sets[i], ttl, redis.call("PTTL", sets[i])) end
  end
  expire(session.key, ttl)
  if not session.created then redis.call("HSET", session.key, "_created", integer(now)) end
  return ttl
end

-- A key of another type under the name of a set holds no id: no reason to keep a session alive.
local function leave(set, id)
  local reply = redis.pcall("SREM", set, id)
  if type(reply) == "table" and not string.find(reply.err, "WRONGTYPE") then redis.call("SREM", set, id) end
end

-- End a session: first the hash, so that it is never alive outside its sets.
local function bury(session, reason)
  redis.call("DEL", session.key)
  redis.call("HSET", session.key, "_ended", reason)
  redis.call("PEXPIRE", session.key, tombstone)
  for n = 1, #refs do
    for _, set in ipairs(sets_in(session, n)) do leave(set, session.id) end
  end
end
