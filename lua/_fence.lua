--[[
  Fences: a hash beside a reference set, while delete_by_ref works through the set or its value is blocked.
    round             the number of calls of delete_by_ref that have begun
    calls             how many of them are not done
    call:<token>      the round of a call that is not done, or "done"
    reason            the reason of the last call, for sessions that leave the set meanwhile
    id:<id>           the round in which a session joined: calls of that round and before spare it
    until, why        until when, in milliseconds, nothing may join the value, and the reason

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]
local function fence_of(set) return set_stem .. "_fence:" .. string.sub(set, #set_stem + 1) end
