--[[
  The lifetimes of sessions and of their reference sets. Needs sets.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- How many members of a set to check when a session joins it or moves its horizon. If one of them is dead, check MORE
-- members. So while more than a fifth of a set is dead, its dead ids leave faster than new ones come.
local SAMPLE, MORE = 2, 8

-- Return the horizon of a TTL: the time until which the sets of the session live. It is the end of the session, rounded
-- up to a step. So most renewals need not touch the sets. A step is a power of two, from a 64th to a 32nd of the TTL.
-- As the TTL shrinks, the step can only halve. So without a renewal, the horizon never becomes later.
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

-- Let a set live at least as long as a session. *before* is the PTTL of the set: -2 for a new set. A set without a TTL,
-- which another program made, gets none. On Redis 6.2 and 7.0 the time runs on in scripts. So use PEXPIREAT: PEXPIRE
-- would count from the time of the command. A PTTL is also shorter there than it was at `now`: SPARE makes up for that.
local SPARE = 100
local function outlive(set, ttl, before)
  local till = horizon(ttl)
  if before == -2 or (before >= 0 and now + before < till) then redis.call("PEXPIREAT", set, till + SPARE) end
end

-- Remove dead ids from sets. *samples* holds sets and some of their members: set, members, ...
local function prune(samples)
  local names, n = {}, 0
  for i = 2, #samples, 2 do
    local ids = samples[i]
    for j = 1, #ids do names[n + j] = session_key(ids[j]) end
    n = n + #ids
  end
  spent = spent + n * 0.5
  if n == 0 then return end
  local found = redis.pcall("EXISTS", unpack(names))
  if found == n or elsewhere(found) then return end
  if type(found) == "table" then error(found.err, 0) end
  for i = 1, #samples, 2 do
    local set, ids, dead = samples[i], samples[i + 1], {}
    for round = 1, 2 do
      for j = 1, #ids do
        if redis.call("EXISTS", session_key(ids[j])) == 0 then dead[#dead + 1] = ids[j] end
      end
      if #dead == 0 or round == 2 then break end
      ids = redis.call("SRANDMEMBER", set, MORE)
      spent = spent + 10
    end
    if #dead > 0 then redis.call("SREM", set, unpack(dead)) end
  end
end

-- Return the TTL of a session from now on. *given*: a new max_age in milliseconds, or nil to use the present one.
local function lifetime(session, given)
  if not now then clock() end
  local age = given or tonumber(session.held[4] or max_age)
  if max_lifetime == 0 then return age end
  return math.min(age, (session.held[3] or now) + max_lifetime - now)
end

-- Give the hash of a session its notes, `_created` and `_max_age`, and then its TTL. If the TTL has passed already,
-- PEXPIREAT removes the hash. Notes that are written afterwards would make a hash that never expires.
local function expire(session, name, given, ttl)
  local held = session.held
  if not held[3] then redis.call("HSET", name, "_created", now) end
  if given and given ~= tonumber(held[4] or 0) then redis.call("HSET", name, "_max_age", given) end
  redis.call("PEXPIREAT", name, now + ttl)
end

-- Renew a session and its sets, and return the new TTL. The horizons are compared with a second to spare: the PTTL of
-- the session may have been read later than `now`.
local function renew(session, given)
  local ttl = lifetime(session, given)
  if horizon(ttl) > horizon(session.ttl - 1000) then
    local samples = {}
    for n = 1, references do
      for _, set in ipairs(sets_in(session, n)) do
        spent = spent + 3
        local before = inquire("PTTL", set)
        if before == -2 then surely(before, set) end
        outlive(set, ttl, before)
        local members = #samples < 100 and redis.pcall("SRANDMEMBER", set, SAMPLE)
        if members and not members.err then
          samples[#samples + 1] = set
          samples[#samples + 1] = members
        end
      end
    end
    prune(samples)
  end
  expire(session, session.key, given, ttl)
  return ttl
end
