--[[
  Moving a session between reference sets: checked as a whole, then done. Needs _lifetime.lua.

  KEYS        none
  ARGV        none

  Returns nothing: it stands in front of the scripts that need it.
]]

-- How many members are looked at when a set is joined: expired ids leave faster than new ones come. At a limit, all
-- are, up to so many more: a set larger than that, since the limit is new, shrinks with each session that joins.
local SAMPLE, SURPLUS = 4, 500

-- To look at a session takes as long as so many bytes.
local LOOK = 500

-- Whether a session is in all of these sets already, and in no other: hardly a write moves it.
local function settled(session, sets)
  for n = 1, #refs do
    local before, after = sets_in(session, n), sets[n] or sets_in(session, n)
    if #before ~= #after then return false end
    for i = 1, #after do
      if not has(before, after[i]) or redis.pcall("SISMEMBER", after[i], session.id) ~= 1 then return false end
    end
  end
  return true
end

-- Make room in a set for one more: what to evict for it is added to the plan. Returns an error if it is refused.
local function make_room(plan, n, set)
  local live, members = {}, redis.call("SRANDMEMBER", set, refs[n].limit + SURPLUS)
  weigh(#members * LOOK)
  for _, id in ipairs(members) do
    local session = id ~= plan.id and belongs(id, n, set)
    if session and not plan.evicted[id] then
      live[#live + 1] = session
    elseif not session and id ~= plan.id then
      plan.dead[#plan.dead + 1] = { set, id }
    end
  end
  if #live < refs[n].limit then return end
  if refs[n].on_limit == "refuse" then return redis.error_reply("RSSLIMIT " .. refs[n].field) end
  table.sort(live, function(a, b) return tonumber(a.created or 0) < tonumber(b.created or 0) end)
  for i = 1, #live - refs[n].limit + 1 do plan.evicted[live[i].id] = live[i] end
end

-- What leaving a set means where delete_by_ref is at work: a session that was in it when that began ends here, or it
-- would slip away; one that joined later stays marked as such, if only its id changes.
local function pass_fence(plan, session, set, stays)
  local fence = redis.pcall("HMGET", fence_of(set), "round", "reason", "id:" .. session.id)
  if fence.err then return fence end
  local round, joined = tonumber(fence[1]), tonumber(fence[3] or 0)
  if round and joined < round then plan.doomed = fence[2] end
  if round and stays then plan.marks[#plan.marks + 1] = { fence_of(set), "id:" .. plan.id, joined } end
end

-- What must happen for a session to be in these sets under this id, which is a new one in a rotation: also a set that
-- was lost, to an eviction say, is joined again. Returns an error if it cannot be. Writes nothing, but for the end of a
-- session that is doomed.
local function plan_move(session, id, sets)
  local plan = { id = id, joins = {}, leaves = {}, marks = {}, dead = {}, evicted = {} }
  for n = 1, #refs do
    local before, after = sets_in(session, n), sets[n] or sets_in(session, n)
    for _, set in ipairs(after) do
      local size = redis.pcall("SCARD", set)
      if type(size) == "table" then return size end
      local new = not has(before, set)
      local refused = new and refs[n].limit > 0 and size >= refs[n].limit and make_room(plan, n, set)
      if refused then return refused end
      local round = new and redis.pcall("HGET", fence_of(set), "round")
      if type(round) == "table" then return round end
      if round then plan.marks[#plan.marks + 1] = { fence_of(set), "id:" .. id, round } end
      plan.joins[#plan.joins + 1] = { set = set, ttl = redis.call("PTTL", set) }
    end
    for _, set in ipairs(before) do
      if id ~= session.id or not has(after, set) then
        plan.leaves[#plan.leaves + 1] = set
        local failed = pass_fence(plan, session, set, has(after, set))
        if failed then return failed end
      end
    end
  end
  if plan.doomed then
    bury(session, plan.doomed)
    return redis.error_reply("RSSENDED " .. plan.doomed)
  end
  return plan
end

-- Before the hash is written: enter the sets. It comes first, so that a server without memory refuses all of it.
local function enter(plan)
  for _, join in ipairs(plan.joins) do redis.call("SADD", join.set, plan.id) end
  for _, mark in ipairs(plan.marks) do redis.call("HSET", unpack(mark)) end
end

-- After it: let the sets live as long as the session, leave others, end what was evicted, and let go of some ids whose
-- session has expired.
local function settle(plan, session, ttl)
  for _, join in ipairs(plan.joins) do
    outlive(join.set, ttl, join.ttl)
    for _, id in ipairs(redis.call("SRANDMEMBER", join.set, SAMPLE)) do
      local gone = id ~= plan.id and redis.call("EXISTS", session_key(id)) == 0
      if gone then plan.dead[#plan.dead + 1] = { join.set, id } end
    end
  end
  for _, set in ipairs(plan.leaves) do leave(set, session.id) end
  for _, evicted in pairs(plan.evicted) do bury(evicted, "evicted") end
  for _, dead in ipairs(plan.dead) do leave(dead[1], dead[2]) end
end
