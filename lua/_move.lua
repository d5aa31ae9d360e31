--[[
  Moving a session between reference sets: plan the whole move, then do it. Needs session, write, renew, end, fence.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- In a full set, a write looks at this many members beyond the limit. So if a limit is new, a set that exceeds it
-- shrinks with each session that joins.
local SURPLUS = 100

-- If a session arrives from another partition: the fences of the sets that it had there, as keys. It may join the same
-- sets here, even if they are blocked or full. It evicts nobody before `confirm_with_refs`.
local arrives = false

clock()

-- Read the wanted sets of the next session from KEYS into `sets`, for each reference. ARGV after *counts* holds the
-- number of sets of each reference, or "keep" for a field that is not written. All sessions of a batch share these.
local sets = {}
local function read_sets(counts)
  for n = 1, references do
    local count = ARGV[counts + n]
    if count == "keep" then
      sets[n] = false
    elseif count == "1" then
      key = key + 1
      sets[n] = { KEYS[key] }
    else
      sets[n] = {}
      for i = 1, tonumber(count) do
        key = key + 1
        sets[n][i] = KEYS[key]
        if i > 1 then sets[n][KEYS[key]] = true end
      end
    end
  end
end

-- Return how many references, counted from the first, need no move: the session is in exactly the wanted set. Most
-- writes move no session. `plan_move` handles the other references. Returns an error if a set has another type.
local function settled(session)
  local held = session.held
  for n = 1, references do
    local value, wanted = held[4 + n], sets[n]
    local set = value and set_of(n, value)
    if set then
      if wanted and (wanted[1] ~= set or wanted[2]) then return n - 1 end
      local member = strict and strict[n] and 1 or redis.pcall("SISMEMBER", set, held[1])
      if member ~= 1 then surely(member, set) end
      if member ~= 1 then return member == 0 and n - 1 or member end
    elseif value and value ~= "null" or wanted and wanted[1] then
      return n - 1
    end
  end
  return references
end

-- Whether the write would change the identity of the session.
local function changes_identity(session)
  local after = identity and sets[identity]
  local before = after and sets_in(session, identity)
  return after and (before[1] ~= after[1] or before[2] ~= after[2])
end

-- Whether the data of the n-th reference names a set. Parsing a long list takes time. So once enough is spent, assume
-- that a list names the set, because its session is a member.
local function names(n, held, set)
  local one = held and set_of(n, held)
  if one or not held or held == "" or held == "null" then return one == set end
  return spent >= ENOUGH or has(sets_of(n, held), set)
end

-- Make room in a full set for one more session. Add the oldest member to `evicted`, and any surplus to `surplus`.
-- Returns an error if the reference refuses. A member that is older than max_lifetime does not count. But it stays in
-- the set, because a store with other options may find it alive. A member that another strict reference has revoked
-- counts, because checking that would take too long.
local function make_room(plan, n, set)
  local live, dead, limit, evicts = {}, {}, limits[n], not (refuses and refuses[n])
  local members = redis.call("SRANDMEMBER", set, limit + SURPLUS)
  spent = spent + 3 * #members
  for i = 1, #members do
    local id = members[i]
    local name = session_key(id)
    local held = redis.pcall("HMGET", name, "id", "_ended", "_created", state[4 + n], "_arriving")
    local created = not held.err and tonumber(held[3] or 0)
    if held.err or not held[1] and not held[2] then surely(held, name) end
    if held.err then wrong_type(held) end
    if held.err or held[2] or not held[1] or not names(n, held[4], set) then
      if id ~= plan.id then dead[#dead + 1] = id end
    elseif id ~= plan.id and not (held[5] and evicts) and not (plan.evicted and plan.evicted[id]) then
      local expired = max_lifetime > 0 and held[3] and created + max_lifetime <= now
      if not expired then live[#live + 1] = { id = id, created = created } end
    end
  end
  if #dead > 0 then
    plan.dead = plan.dead or {}
    plan.dead[set] = dead
  end
  if #live < limit then return end
  if not evicts then return redis.error_reply("RSSLIMIT " .. state[4 + n]) end
  plan.evicted = plan.evicted or {}
  if #live > limit then table.sort(live, function(a, b) return a.created < b.created end) end
  for i = 2, #live == limit and limit or 0 do
    if live[i].created < live[1].created then live[1] = live[i] end
  end
  plan.evicted[live[1].id] = true
  for i = 2, #live - limit + 1 do plan.surplus[#plan.surplus + 1] = live[i].id end
end

-- Plan that the session joins a set. Returns an error if it cannot.
local function plan_join(plan, n, set)
  local members, limit = redis.pcall("SRANDMEMBER", set, SAMPLE), limits and limits[n] or 0
  if not members[1] then surely(members, set) end
  if members.err then return members end
  if arrives and (arrives[fence_of(set)] or not (refuses and refuses[n])) then limit = 0 end
  if limit > 0 and redis.call("SCARD", set) >= limit then
    local refused = make_room(plan, n, set)
    if refused then return refused end
  end
  spent = spent + 6
  local joins, samples, fences = plan.joins, plan.samples, plan.fences
  joins[#joins + 1], joins[#joins + 2] = set, members[1] and redis.call("PTTL", set) or -2
  fences[#fences + 1] = fence_of(set)
  plan.numbers[#fences] = n
  if #samples < 100 then samples[#samples + 1], samples[#samples + 2] = set, members end
end

-- Check the fences of the plan. The first *joined* ones belong to sets that the session joins, the others to sets that
-- it leaves. Returns an error if the session would join a blocked value. While delete_by_ref works through a set, its
-- sessions must end when they leave, or they would escape: end such a session, and return an error. A session that
-- joins gets a mark. If only the id changes, the new id gets the mark of the old one.
local function pass_fences(plan, session, joined)
  local fences, doomed = plan.fences, nil
  local fenced = fences[1] and inquire("EXISTS", unpack(fences)) or 0
  for i = 1, asked and #fences or 0 do surely(nil, fences[i]) end
  if fenced == 0 then return end
  plan.marks = {}
  for i = 1, #fences do
    local fence = fences[i]
    local found = redis.pcall("HMGET", fence, "round", "open", "id:" .. session.held[1], "until", "why")
    if found.err then return found end
    local round, open, mark, till = found[1], found[2] or "", found[3] or "0", tonumber(found[4] or 0)
    if i <= joined and till > now and not (arrives and arrives[fence]) then
      return redis.error_reply("RSSBLOCKED " .. found[4] .. " " .. found[5] .. " " .. state[4 + plan.numbers[i]])
    end
    for number in string.gmatch(i > joined and open or "", "%d+") do
      if not spares(mark, tonumber(number)) then doomed = redis.call("HGET", fence, "reason:" .. number) end
    end
    if round and (i <= joined or plan.stays and plan.stays[fence]) then
      plan.marks[#plan.marks + 1] = { fence, "id:" .. plan.id, i <= joined and round or mark }
    end
  end
  if doomed then
    bury(session, doomed)
    return redis.error_reply("RSSENDED " .. doomed)
  end
end

-- Plan the move of a session into `sets`. In a rotation, *id* is its new id. The first *from* references are settled.
-- Each set is looked at once, before anything is written. A set that Redis lost, for example by eviction, is joined
-- again. Returns the plan, or an error. Writes nothing, but ends a session that would escape from delete_by_ref.
-- The plan has:
--   joins     the sets to join and their PTTL: set, pttl, ...
--   keeps     the sets that the session is already in
--   leaves    the sets that the old id leaves
--   samples   the sets to join and some of their members: set, members, ...
--   fences    the fences of the sets to join, then of the sets to leave
--   numbers   the references of the sets to join
--   stays     the fences of the sets that only the old id leaves
--   marks     the arguments of HSET for fences
--   evicted   the ids of sessions to end for a limit
--   surplus   the ids of other sessions to end, if there is time
--   dead      for some sets, the ids to remove
local function plan_move(session, id, from)
  local plan = { id = id, joins = {}, keeps = {}, leaves = {}, samples = {}, fences = {}, numbers = {} }
  local own, joins, keeps, leaves, fences = session.held[1], plan.joins, plan.keeps, plan.leaves, plan.fences
  plan.surplus = {}
  for n = 1, references do
    local before = session.ttl and sets_in(session, n) or NONE
    local after = sets[n] or before
    for i = 1, #after do
      local set = after[i]
      spent = spent + 2.2
      if not has(before, set) then
        local failed = plan_join(plan, n, set)
        if failed then return failed end
      else
        local known = n <= from or strict and strict[n]
        local member = known and 1 or redis.pcall("SISMEMBER", set, own)
        if member ~= 1 then surely(member, set) end
        if member == 1 then
          keeps[#keeps + 1] = set
        elseif member == 0 then
          joins[#joins + 1], joins[#joins + 2] = set, redis.call("PTTL", set)
        else
          return member
        end
      end
    end
    for i = 1, n > from and #before or 0 do
      local set = before[i]
      local stays = has(after, set)
      if id ~= own or not stays then
        leaves[#leaves + 1] = set
        spent = spent + 2.2
        if stays then
          plan.stays = plan.stays or {}
          plan.stays[fence_of(set)] = true
        end
      end
    end
  end
  local joined = #fences
  for i = 1, #leaves do fences[joined + i] = fence_of(leaves[i]) end
  local failed = pass_fences(plan, session, joined)
  if failed then return failed end
  return plan
end

-- Join the sets of the plan, before the hash is written. SADD must come first: a server that is out of memory refuses
-- only the first write of a script. *name*: the key of a new hash, or nil. If a later command is refused, for example
-- by the ACL, `undo` removes the new hash, and the id from the joined sets.
local function enter(plan, session, name, ttl)
  local joins, keeps, marks, id = plan.joins, plan.keeps, plan.marks, plan.id
  undo = function()
    if name then
      redis.pcall("UNLINK", name)
      redis.pcall("PEXPIREAT", name, 0)
    end
    for i = 1, #joins, 2 do redis.pcall("SREM", joins[i], id) end
    for i = 1, id ~= session.held[1] and #keeps or 0 do redis.pcall("SREM", keeps[i], id) end
  end
  for i = 1, #joins, 2 do
    redis.call("SADD", joins[i], id)
    outlive(joins[i], ttl, joins[i + 1])
  end
  for i = 1, id ~= session.held[1] and #keeps or 0 do redis.call("SADD", keeps[i], id) end
  for i = 1, marks and #marks or 0 do redis.call("HSET", unpack(marks[i])) end
end

-- Finish a move, after the hash has its TTL. Renew the kept sets, leave the others, end the evicted sessions, and
-- remove dead ids from the joined sets.
local function settle(plan, session, ttl)
  local keeps, leaves, own = plan.keeps, plan.leaves, session.held[1]
  if keeps[1] and horizon(ttl) > horizon(session.ttl - 1000) then
    for i = 1, #keeps do outlive(keeps[i], ttl, redis.call("PTTL", keeps[i])) end
  end
  for i = 1, #leaves do leave(leaves[i], own) end
  local undo_all = undo
  local function evict(id)
    local evicted = look(session_key(id))
    if evicted and evicted.ttl then bury(evicted, "evicted") end
    undo = undo_all
  end
  for id in pairs(plan.evicted or NONE) do evict(id) end
  for _, id in ipairs(plan.surplus) do
    if spent < ENOUGH then evict(id) end
  end
  for set, dead in pairs(plan.dead or NONE) do spread("SREM", set, dead, 1, #dead) end
  prune(plan.samples)
  undo = false
end
