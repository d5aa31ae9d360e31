--[[
  Going through a reference set page by page. Needs session.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- The session with this id, if its hash names the set, which is one of the n-th reference. It may be `ended` for this
-- store and alive for another one with other options. Nil means that the set need not hold the id.
local function member(id, n, set, every, fields)
  local session = look(session_key(id), every, fields)
  return session and session.ttl and has(sets_in(session, n), set) and session
end

-- Call a function for each of some ids until enough time is spent, for at least one. Returns the ids that are left.
local function each_of(ids, run)
  local left = {}
  for i = 1, #ids do
    if i > 1 and spent >= ENOUGH then left[#left + 1] = ids[i] else run(ids[i]) end
  end
  return left
end

-- Read the next n arguments as a list.
local function args(n)
  local list = {}
  for i = 1, n do list[i] = ARGV[arg + i] end
  arg = arg + n
  return list
end
