--[[
  Fences: a hash beside a reference set, while delete_by_ref works through the set or its value is blocked.
    round             the number of calls of delete_by_ref that have begun
    open              the rounds of those that are not done, each behind a space: " 3 5"
    call:<token>      the round of a call that is not done, or "done"
    reason:<round>    the reason of a call that is not done, for sessions that leave the set meanwhile
    id:<id>           the mark of a session: the round in which it joined, or 0, and the rounds of the calls that keep
                      it, each behind a space: "0 5"
    until, why        until when, in milliseconds, nothing may join the value, and the reason

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]
local function fence_of(set) return set_stem .. "_fence:" .. string.sub(set, #set_stem + 1) end

-- Whether a call spares a session with this mark: it joined in the call's round or a later one, or the call keeps it.
local function spares(mark, round)
  local since = tonumber(string.match(mark, "%d+"))
  return since >= round or string.find(mark .. " ", " " .. round .. " ", 1, true) ~= nil
end
