--[[
  Ending sessions. Needs sets.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- Remove an id from a set. Ignore a key of another type: it holds no id, and a session must still end.
local function leave(set, id)
  local reply = redis.pcall("SREM", set, id)
  if type(reply) == "table" then wrong_type(reply) end
end

-- Write a tombstone under a free key. The arguments follow the field `_ended`. If PEXPIRE fails, `undo` removes the
-- tombstone, so it never stays without a TTL.
local function entomb(name, lives, ...)
  undo = function() redis.pcall("UNLINK", name) end
  redis.call("HSET", name, "_ended", ...)
  redis.call("PEXPIRE", name, lives)
  undo = false
end

-- End a session that has a `ttl`. Remove the hash first, so that the session is never alive outside its sets. UNLINK
-- must precede HSET: without memory, a server refuses an HSET that is the first write of a script.
local function bury(session, reason)
  local name = session.key
  redis.call("UNLINK", name)
  entomb(name, tombstone, reason)
  spent = spent + 2
  for n = 1, references do
    local sets = sets_in(session, n)
    spent = spent + #sets
    for i = 1, #sets do leave(sets[i], session.held[1]) end
  end
end
