--[[
  A session as it stands. Needs _store.lua.

  KEYS        none
  ARGV        none

  Returns nothing: it stands in front of the scripts that need it.
]]
local state, strict = { "id", "_ended", "_created", "_max_age" }, {}
for n, ref in ipairs(refs) do
  state[4 + n] = ref.field
  if ref.strict then strict[#strict + 1] = n end
end

-- What HMGET tells of "id", "_ended", "_created" and "_max_age", out of what HGETALL told.
local function pick(fields)
  local id, ended, created, age
  for i = 1, #fields, 2 do
    local field, value = fields[i], fields[i + 1]
    if field == "id" then id = value elseif field == "_ended" then ended = value end
    if field == "_created" then created = value elseif field == "_max_age" then age = value end
  end
  return id, ended, created, age
end

-- The sets of the n-th reference that a session is in, as far as its hash says.
local function sets_in(session, n)
  if not session[n] then
    local held = session.held and session.held[4 + n]
    for i = 1, session.fields and #session.fields or 0, 2 do
      if session.fields[i] == refs[n].field then held = session.fields[i + 1] end
    end
    session[n] = sets_of(refs[n], held)
  end
  return session[n]
end

-- The session under a key, with all of its fields if they are wanted; nil if there is none. One that must not live has
-- the reason as `ended`, a tombstone has nothing else; a key that is no hash has only `err`.
local function look(name, all)
  local fields = all and redis.pcall("HGETALL", name)
  local held = fields or redis.pcall("HMGET", name, unpack(state))
  if held.err then return held end
  local id, ended, created, age = held[1], held[2], held[3], held[4]
  if fields then id, ended, created, age = pick(fields) end
  if ended then return { key = name, ended = ended } end
  local ttl = id and redis.call("PTTL", name)
  if not ttl or ttl <= 0 then return nil end
  local session = { key = name, id = id, created = created, ttl = ttl, held = not all and held, fields = fields }
  session.max_age = age and tonumber(age)
  if max_lifetime > 0 and created and created + max_lifetime <= now then session.ended = "expired" end
  for _, n in ipairs(strict) do
    for _, set in ipairs(sets_in(session, n)) do
      if redis.pcall("SISMEMBER", set, id) ~= 1 then session.ended = "revoked" end
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

-- The session with that id if it lives and belongs into the set, which is one of the n-th reference.
local function belongs(id, n, set, all)
  local session = look(session_key(id), all)
  return session and not session.ended and has(sets_in(session, n), set) and session
end
