--[[
  Publishing events.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- Publish an event: its kind and its details, as a JSON list. Nil if the store has no events. The channel is in the
-- slot of the partition. An error is ignored, because the write is done. If the slot moves, subscribers are told of a
-- gap. Redis 6.2 has no SPUBLISH.
local tell = events and function(...)
  local channel, message = set_stem .. "_events", cjson.encode({ ... })
  local sent = redis.pcall(partitioned and "SPUBLISH" or "PUBLISH", channel, message)
  if partitioned and type(sent) == "table" then redis.pcall("PUBLISH", channel, message) end
end

-- Return the data of the identity of a session. Nil if the store has no events, or no identity.
local identity_in = events and identity and function(session)
  local fields = session.fields or {}
  for i = 1, #fields, 2 do
    if fields[i] == state[4 + identity] then return fields[i + 1] end
  end
  return not session.fields and session.held[4 + identity]
end
