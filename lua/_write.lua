--[[
  The common parts of the scripts that write to sessions.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- Return the error for a session that cannot be written to. Nil if it can.
local function refusal(session)
  if not session or session.ended == ARRIVING then return redis.error_reply("RSSNOTFOUND no such session") end
  if session.err then return session end
  if session.ended then return redis.error_reply("RSSENDED " .. session.ended) end
end

-- Call a command on a key with the items *first* to *last* of a list, in pieces. `unpack` would fail at 8,000 items.
local function spread(command, name, list, first, last)
  if last - first < 1000 then
    if last >= first then redis.call(command, name, unpack(list, first, last)) end
    return
  end
  for i = first, last, 1000 do redis.call(command, name, unpack(list, i, math.min(i + 999, last))) end
end
