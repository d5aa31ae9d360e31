--[[
  How long sessions and their reference sets live, and how they end. Needs _session.lua.

  KEYS        none
  ARGV        none

  Returns nothing: it stands in front of the scripts that need it.
]]

-- By the clock, not from the moment of the command: where time runs on in a script, a set would die before its session.
-- Redis writes a number of Lua with all of its digits, up to 2^53.
local function expire(name, ttl) redis.call("PEXPIREAT", name, now + ttl) end

-- Until when its sets live at least, for a session that has so long to live: a round time. While that stays the same,
-- they need not be renewed with the session. The steps are a 64th to a 32nd of that, and powers of two: as a session
-- grows old they become smaller always by a half, and the sets still live until then.
local power, step = 0, 1
local function horizon(ttl)
  if ttl < power or ttl >= 2 * power then
    local _, exponent = math.frexp(ttl)
    power = math.ldexp(1, exponent - 1)
    step = math.max(power / 32, 1)
  end
  local till = now + ttl
  return till + -till % step
end

-- Let a set live as long as a session. One without a TTL, made by others, keeps none; -2: it was not there.
local function outlive(set, ttl, before)
  local till = horizon(ttl)
  if before == -2 or (before >= 0 and now + before < till) then redis.call("PEXPIREAT", set, till) end
end

-- What a session has left to live that is given max_age from now on; 0: what it was given before.
local function lifetime(session, max_age)
  if max_age == 0 then max_age = session.max_age or default_age end
  if max_lifetime == 0 then return max_age end
  return math.min(max_age, (session.created or now) + max_lifetime - now)
end

-- Add to the values of a session what is to be noted: when it was made, and how long it lives if it is given a time of
-- its own.
local function note(session, max_age, values)
  if not session.created then append(values, "_created", integer(now)) end
  if max_age > 0 and max_age ~= (session.max_age or default_age) then append(values, "_max_age", integer(max_age)) end
  return values
end

-- Let a session live on, and with it the sets it is in. Returns what it has left to live.
local function renew(session, max_age)
  local ttl = lifetime(session, max_age)
  if horizon(ttl) > horizon(session.ttl - 1000) then -- A second, since PTTL may count from somewhat before `now`.
    for n = 1, #refs do
      for _, set in ipairs(sets_in(session, n)) do outlive(set, ttl, redis.call("PTTL", set)) end
    end
  end
  expire(session.key, ttl)
  spread("HSET", session.key, note(session, max_age, {}))
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
