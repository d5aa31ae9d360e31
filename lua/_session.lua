--[[
  A session as it stands, what keeps it alive, and its end. Needs _store.lua.

  KEYS        none
  ARGV        none

  Returns nothing: the loader puts it in front of the scripts that need it.
]]
local state, place, blank, strict = { "id", "_ended", "_created" }, {}, {}, {}
for n, ref in ipairs(refs) do
  state[3 + n] = ref.field
  if ref.strict then strict[#strict + 1] = n end
end
for i, field in ipairs(state) do place[field], blank[i] = i, false end

-- The sets of the n-th reference that a session is in, as far as its hash says.
local function sets_in(session, n)
  session[n] = session[n] or sets_of(refs[n], session.held and session.held[3 + n])
  return session[n]
end

-- The session under a key, with all of its fields if they are wanted; nil if there is none. One that must not live has
-- the reason as `ended`, a tombstone has nothing else; a key that is no hash has only `err`.
local function look(name, all)
  local fields = all and redis.pcall("HGETALL", name)
  local held = fields and { unpack(blank) } or redis.pcall("HMGET", name, unpack(state))
  for i = 1, fields and #fields or 0, 2 do
    if place[fields[i]] then held[place[fields[i]]] = fields[i + 1] end
  end
  if (fields or held).err then return fields or held end
  if held[2] then return { key = name, ended = held[2] } end
  local ttl = held[1] and redis.call("PTTL", name)
  if not ttl or ttl <= 0 then return nil end
  local session = { key = name, id = held[1], created = held[3], ttl = ttl, held = held, fields = fields }
  if max_lifetime > 0 and session.created and session.created + max_lifetime <= now then session.ended = "expired" end
  for _, n in ipairs(strict) do
    for _, set in ipairs(sets_in(session, n)) do
      if redis.pcall("SISMEMBER", set, session.id) ~= 1 then session.ended = "revoked" end
    end
  end
  return session
end

-- The same, but the id of a session that was rotated with grace leads to the session.
local function find(name, all)
  local session = look(name, all)
  while session and session.ended == "rotated" do
    local to = redis.call("HMGET", session.key, "_next", "_until")
    local successor = to[1] and tonumber(to[2]) > now and look(session_key(to[1]), all)
    if not successor then break end
    session = successor
  end
  return session
end

-- The id and some fields of a session, or all, which it was looked up with, as a flat list: field, value, ...
local function read(session, fields)
  if not fields then return session.fields end
  local list = { "id", session.id }
  for first = 1, #fields, 1000 do
    local values = redis.call("HMGET", session.key, unpack(fields, first, math.min(first + 999, #fields)))
    for i, value in ipairs(values) do
      if value then append(list, fields[first + i - 1], value) end
    end
  end
  return list
end

-- Why that session cannot be written to, as an error; nil if it can.
local function refusal(session)
  if not session then return redis.error_reply("RSSNOTFOUND no such session") end
  if session.err then return session end
  if session.ended then return redis.error_reply("RSSENDED " .. session.ended) end
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
    for _, set in ipairs(sets_in(session, n)) do outlive(set, ttl, redis.call("PTTL", set)) end
  end
  expire(session.key, ttl)
  if not session.created then redis.call("HSET", session.key, "_created", integer(now)) end
  return ttl
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

-- The session with that id if it lives and belongs into the set, which is one of the n-th reference.
local function belongs(id, n, set, all)
  local session = look(session_key(id), all)
  return session and not session.ended and has(sets_in(session, n), set) and session
end
