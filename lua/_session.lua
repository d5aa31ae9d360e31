--[[
  Reading the state of a session. Needs sets.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- Set `held` of a session that was read with all fields. It lacks the references: `sets_in` finds these in the fields.
local function detail(session)
  local fields, held = session.fields, { false, false, false, false }
  for i = 1, #fields, 2 do
    local field = fields[i]
    local place = field == "id" and 1 or field == "_created" and 3 or field == "_max_age" and 4
    if place then held[place] = fields[i + 1] end
  end
  session.held = held
end

-- The value of `ended` for the copy of a session of another partition, until `confirm_with_refs`. It counts as absent.
local ARRIVING = "arriving"

-- Set `ended` of a session that is alive in Redis, but not for this store. It is older than max_lifetime, or not in the
-- set of a strict reference. For a store with other options it may be alive.
local judge = (strict or max_lifetime > 0) and function(session)
  if not session.held then detail(session) end
  local created = session.held[3]
  if max_lifetime > 0 and created and created + max_lifetime <= clock() then session.ended = "expired" end
  for n = 1, strict and references or 0 do
    local sets = strict[n] and sets_in(session, n) or NONE
    spent = spent + #sets
    for i = 1, #sets do
      local member = redis.pcall("SISMEMBER", sets[i], session.held[1])
      if member ~= 1 then
        surely(member, sets[i])
        if type(member) == "table" then wrong_type(member) end
        session.ended = "revoked"
      end
    end
  end
end

-- Return the session under a key. Nil if there is none.
--   all     true: read all fields into `fields`; false: read `state`, or the fields in `more`, into `held`
-- `ended` is the reason why the session is not alive. A tombstone has no `ttl`. A key of another type has only `err`.
local function look(name, all, more)
  local reply, id, ended, arriving
  if all then
    local bytes = 0
    reply = redis.pcall("HGETALL", name)
    for i = 1, #reply, 2 do
      local field, value = reply[i], reply[i + 1]
      bytes = bytes + #value
      if field == "id" then id = value elseif field == "_ended" then ended = value end
      arriving = arriving or partitioned and field == "_arriving"
    end
    spent = spent + 1.5 + #reply * (#reply > 256 and 0.6 or 0.3) + bytes * 0.015
  else
    reply = redis.pcall("HMGET", name, unpack(more or state))
    id, ended, arriving = reply[1], reply[2], partitioned and reply[5 + references]
    spent = spent + 2.5
  end
  if reply.err then
    surely(reply, name)
    return wrong_type(reply)
  end
  if ended then return { key = name, ended = ended } end
  local ttl = id and redis.call("PTTL", name)
  if not ttl or ttl <= 0 then return nil end
  local session = { key = name, ttl = ttl, held = not all and reply, fields = all and reply }
  if arriving then session.ended = ARRIVING elseif judge then judge(session) end
  return session
end

-- Return the session under a key, as `look` does. Follow a grace to the successor, over at most eight rotations.
local function find(name, all, more)
  local session, hops = look(name, all, more), 0
  while session and session.ended == "rotated" and hops < 8 do
    local to = redis.call("HMGET", session.key, "_next", "_until")
    if not to[1] or tonumber(to[2]) <= clock() then break end
    local successor = look(session_key(to[1]), all, more)
    if not successor then
      surely(nil, session_key(to[1]))
      break
    end
    session, hops = successor, hops + 1
  end
  return session
end
