--[[
  A session as it stands, what keeps it alive, and its end. Needs _store.lua.

  KEYS        none
  ARGV        none

  Returns nothing: the loader puts it in front of the scripts that need it.
]]
local state = { "id", "_ended", "_created" }
for i, ref in ipairs(refs) do state[3 + i] = ref.field end

-- The session under a key, with the sets of the n-th reference at [n]; nil if there is none. One that must not live has
-- the reason as `ended`, a tombstone has nothing else; a key that is no hash has only `err`.
local function look(name)
  local held = redis.pcall("HMGET", name, unpack(state))
  if held.err then return held end
  if held[2] then return { key = name, ended = held[2] } end
  local ttl = redis.call("PTTL", name)
  if not held[1] or ttl <= 0 then return nil end
  local session = { key = name, id = held[1], created = tonumber(held[3]), ttl = ttl }
  if max_lifetime > 0 and session.created and session.created + max_lifetime <= now then session.ended = "expired" end
  for i, ref in ipairs(refs) do
    session[i] = sets_of(ref.field, held[3 + i])
    for _, set in ipairs(ref.strict and session[i] or {}) do
      if redis.pcall("SISMEMBER", set, session.id) ~= 1 then session.ended = "revoked" end
    end
  end
  return session
end

-- The same, but the id of a session that was rotated with grace leads to the session.
local function find(name)
  local session = look(name)
  while session and session.ended == "rotated" do
    local to = redis.call("HMGET", session.key, "_next", "_until")
    local successor = to[1] and tonumber(to[2]) > now and look(session_key(to[1]))
    if not successor then break end
    session = successor
  end
  return session
end

-- The id and these fields of a session, or all, as a flat list: field, value, ...
local function read(session, fields)
  if not fields then return redis.call("HGETALL", session.key) end
  local list = { "id", session.id }
  for _, field in ipairs(fields) do
    local value = redis.call("HGET", session.key, field)
    if value then append(list, field, value) end
  end
  return list
end

-- Why that session cannot be written to, as an error; nil if it can.
local function refusal(session)
  if not session then return redis.error_reply("RSSNOTFOUND no such session") end
  if session.err then return session end
  if session.ended then return redis.error_reply("RSSENDED " .. session.ended) end
end

-- By the clock, not from the moment of the command: where time runs on in a script, a set would die before its session.
local function expire(name, ttl) redis.call("PEXPIREAT", name, integer(now + ttl)) end

-- A set lives at least as long as its members. One without a TTL, made by others, keeps none; -2: it was not there.
local function outlive(set, ttl, before)
  if before == -2 or (before >= 0 and before < ttl) then expire(set, ttl) end
end

-- What a session that is given max_age has left to live.
local function lifetime(session, max_age)
  if max_lifetime == 0 then return max_age end
  return math.min(max_age, (session.created or now) + max_lifetime - now)
end

-- Let a session live on, and with it the sets it is in. Returns what it has left to live.
local function renew(session, max_age)
  local ttl = lifetime(session, max_age)
  for i = 1, #refs do
    for _, set in ipairs(session[i]) do outlive(set, ttl, redis.call("PTTL", set)) end
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
  for i = 1, #refs do
    for _, set in ipairs(session[i]) do leave(set, session.id) end
  end
end

-- Whether the id is that of a live session that belongs into the set, which is one of the n-th reference.
local function belongs(id, n, set)
  local session = look(session_key(id))
  for _, other in ipairs(session and not session.ended and session[n] or {}) do
    if other == set then return session end
  end
end
