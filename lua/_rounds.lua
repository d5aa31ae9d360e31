--[[
  The calls of delete_by_ref that need several pages. `_fence.lua` lists the fields of a fence. Needs write, fence.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- A call whose caller has died is never finished, so its fence would collect marks. If there are more than this number
-- when a call begins, forget all of them. Then an unfinished call may end sessions that joined after its begin.
local MARKS = 20000

-- Let a fence live as long as a tombstone, and as long as its block.
local function keep_fence(fence)
  local till = tonumber(redis.call("HGET", fence, "until") or 0)
  redis.call("PEXPIREAT", fence, math.max(clock() + tombstone, till))
end

-- Remove all fields of a fence except those of the block.
local function forget(fence)
  local blocked = redis.call("HMGET", fence, "until", "why")
  redis.call("UNLINK", fence)
  if blocked[1] then redis.call("HSET", fence, "until", blocked[1], "why", blocked[2]) end
end

-- Begin with a write that frees memory. Otherwise a full server would refuse the HSET of a fence, and no session could
-- end.
local function allow_writes(fence, token) redis.call("HDEL", fence, "call:" .. token) end

-- Begin a call: give it a round, and add the round to the marks of the ids to keep. Returns the round.
local function begin(fence, token, reason, keep)
  allow_writes(fence, token)
  if redis.call("HLEN", fence) > MARKS then forget(fence) end
  local round = redis.call("HINCRBY", fence, "round", 1)
  local open = (redis.call("HGET", fence, "open") or "") .. " " .. round
  redis.call("HSET", fence, "call:" .. token, round, "reason:" .. round, reason, "open", open)
  local names, marks = {}, {}
  for i, id in ipairs(keep) do names[i] = "id:" .. id end
  for first = 1, #names, 1000 do
    local found = redis.call("HMGET", fence, unpack(names, first, math.min(first + 999, #names)))
    for i = 1, #found do
      marks[#marks + 1], marks[#marks + 2] = names[first + i - 1], (found[i] or "0") .. " " .. round
    end
  end
  spread("HSET", fence, marks, 1, #marks)
  keep_fence(fence)
  return round
end

-- Note that all pages of a call are done. A server that took over without the writes of the last pages lacks the note.
local function note_end(fence, token)
  redis.call("HDEL", fence, "end:" .. token) -- A full server refuses only the first write.
  redis.call("HSET", fence, "end:" .. token, "")
end

local function is_at_end(fence, token) return redis.call("HGET", fence, "end:" .. token) end

-- Finish a call. If no other call is open, remove all marks. Note that this call is done, because it may be sent again.
local function finish(fence, token, round)
  local open = string.gsub((redis.call("HGET", fence, "open") or "") .. " ", " " .. round .. " ", " ", 1)
  open = string.sub(open, 1, -2)
  redis.call("HDEL", fence, "reason:" .. round, "end:" .. token) -- First: it frees memory.
  if open == "" then forget(fence) else redis.call("HSET", fence, "open", open) end
  redis.call("HSET", fence, "call:" .. token, "done")
  keep_fence(fence)
end
