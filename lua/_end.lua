--[[
  How sessions end. Needs sets.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- Take an id out of a set. A key of another type holds no id, so it must not keep a session alive.
local function leave(set, id)
  local reply = redis.pcall("SREM", set, id)
  if type(reply) == "table" then wrong_type(reply) end
end

-- Leave a tombstone under a name that is free, with these fields behind `_ended`. It never stays without a TTL.
local function entomb(name, lives, ...)
  undo = function() redis.pcall("UNLINK", name) end
  redis.call("HSET", name, "_ended", ...)
  redis.call("PEXPIRE", name, lives)
  undo = false
end

-- End a session that has a `ttl`. The hash goes first, so that the session is never alive outside its sets. UNLINK
-- comes before HSET, since a server that is out of memory takes an HSET only after another write of the script.
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
