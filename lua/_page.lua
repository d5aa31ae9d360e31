--[[
  Reading a reference set page by page. Needs session.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- Return the session with this id, if its hash names the set, which belongs to the n-th reference. The session may be
-- `ended` for this store, but alive for a store with other options. Falsy: the set need not hold the id.
local function member(id, n, set, every, fields)
  local session = look(session_key(id), every, fields)
  if not session then surely(nil, session_key(id)) end
  return session and session.ttl and has(sets_in(session, n), set) and session
end

-- Call a function for each id until enough time is spent, but at least once. Returns the ids that are left.
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
