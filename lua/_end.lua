--[[
  Ending sessions. Needs sets, tell.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- Remove an id from a set. Ignore a key of another type: it holds no id, and a session must still end. If the slot
-- moves, and the set is on the other master, the id stays there until the next read of the set removes it.
local function leave(set, id)
  local reply = redis.pcall("SREM", set, id)
  if type(reply) == "table" and not elsewhere(reply) then wrong_type(reply) end
end

-- Remove the copy of a session that moves. It is no session, so nothing ends: it leaves no tombstone.
local function discard(copy)
  redis.call("UNLINK", copy.key)
  for n = 1, references do
    for _, set in ipairs(sets_in(copy, n)) do leave(set, copy.held[1]) end
  end
end

-- Write a tombstone under a free key. The arguments follow the field `_ended`. If PEXPIRE fails, `undo` removes the
-- tombstone, so it never stays without a TTL.
local function entomb(name, lives, ...)
  undo = function() redis.pcall("UNLINK", name) end
  redis.call("HSET", name, "_ended", ...)
  redis.call("PEXPIRE", name, lives)
  undo = false
end

-- Return the reason for a tombstone: that of this call, unless the session has already ended for this store.
local function reason_for(session, reason)
  return session.ended and session.ended ~= ARRIVING and session.ended or reason
end

-- End a session that has a `ttl`. Remove the hash first, so that the session is never alive outside its sets. UNLINK
-- must precede HSET: without memory, a server refuses an HSET that is the first write of a script.
local function bury(session, reason)
  local name = session.key
  if partitioned then
    -- While a slot moves, its old master does not make a key again that is gone. So the hash becomes the tombstone.
    redis.call("HDEL", name, "id")
    redis.call("HSET", name, "_ended", reason)
    local rest = {}
    for _, field in ipairs(redis.call("HKEYS", name)) do
      if field ~= "_ended" then rest[#rest + 1] = field end
    end
    for i = 1, #rest, 1000 do redis.call("HDEL", name, unpack(rest, i, math.min(i + 999, #rest))) end
    redis.call("PEXPIRE", name, tombstone)
    spent = spent + 2 + #rest * 0.3
  else
    redis.call("UNLINK", name)
    entomb(name, tombstone, reason)
  end
  spent = spent + 2
  for n = 1, references do
    local sets = sets_in(session, n)
    spent = spent + #sets
    for i = 1, #sets do leave(sets[i], session.held[1]) end
  end
  if tell and not session.moves and session.ended ~= ARRIVING then
    tell("ended", session.held[1], reason, identity_in and identity_in(session) or "")
  end
end
