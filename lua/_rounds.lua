--[[
  The calls of delete_by_ref that need several pages. `_fence.lua` says what a fence holds. Needs write, fence.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- A caller that died never finishes its call. So that marks cannot pile up while other calls recur, all are forgotten
-- when a call begins and there are so many. Then a call that is under way may end sessions that joined meanwhile.
local MARKS = 20000

-- Let a fence live as long as it matters.
local function keep_fence(fence)
  local till = tonumber(redis.call("HGET", fence, "until") or 0)
  redis.call("PEXPIREAT", fence, math.max(clock() + tombstone, till))
end

-- Forget all but the block.
local function forget(fence)
  local blocked = redis.call("HMGET", fence, "until", "why")
  redis.call("UNLINK", fence)
  if blocked[1] then redis.call("HSET", fence, "until", blocked[1], "why", blocked[2]) end
end

-- Redis takes an HSET without memory only after another write of the script, and sessions must end also then.
local function allow_writes(fence, token) redis.call("HDEL", fence, "call:" .. token) end

-- Begin a call: give it a round, and add that round to the marks of the ids that it keeps. Returns the round.
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

-- Finish a call. With the last one that is open, forget all but the block, and that this call is done, in case it is
-- sent again.
local function finish(fence, token, round)
  local open = string.gsub((redis.call("HGET", fence, "open") or "") .. " ", " " .. round .. " ", " ", 1)
  open = string.sub(open, 1, -2)
  if open == "" then forget(fence) else redis.call("HSET", fence, "open", open) end
  redis.call("HDEL", fence, "reason:" .. round)
  redis.call("HSET", fence, "call:" .. token, "done")
  keep_fence(fence)
end
