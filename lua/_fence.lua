--[[
  Fences. A fence is a hash beside a reference set. It exists while delete_by_ref works through the set, and while the
  value of the set is blocked. Its fields:
    round             the number of delete_by_ref calls that have begun
    open              the rounds of the calls that are not done, each after a space: " 3 5"
    call:<token>      the round of a call that is not done, or "done"
    end:<token>       exists if the pages of such a call are done
    reason:<round>    the reason of a call that is not done, for sessions that leave the set in the meantime
    id:<id>           the mark of a session: the round in which it joined, or 0; then the rounds of the calls that keep
                      it, each after a space: "0 5"
    until, why        the end of the block in milliseconds, and its reason

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]
local function fence_of(set) return set_stem .. "_fence:" .. string.sub(set, #set_stem + 1) end

-- Whether the call of a round spares a session with this mark. It does if the session joined in this round or later, or
-- if the call keeps the session.
local function spares(mark, round)
  local since = tonumber(string.match(mark, "%d+"))
  return since >= round or string.find(mark .. " ", " " .. round .. " ", 1, true) ~= nil
end
