--[[
  Look for what is wrong with sessions, and mend it if wanted. Needs sets, session, renew.

  KEYS        for each session: its hash, "rss:{<id>}"
  ARGV        the stems, then
    mode              "check"; "mend"; or "mend_and_remove", which also removes the keys that cannot be mended
    added             for each reference "yes" if a session that its sets lack is added although the reference is
                      strict; otherwise "no"

  Returns for each session a list of what was wrong, each as a word and a key:
    "wrong type", key the key holds another type of data: it is removed if wanted
    "endless", key    the key has no TTL: it gets one
    "outside", set    the set lacks the session, which is added
    "short", set      the set would expire before the session: it lives longer
    "stray", key      the hash is neither a session nor a tombstone: it is removed if wanted
]]
local mends, removes = ARGV[3] ~= "check", ARGV[3] == "mend_and_remove"
spent = ENOUGH - 300 -- A batch ends after about a third of a millisecond: nobody waits for it.

local function inspect()
  key = key + 1
  local name, found = KEYS[key], {}
  local function report(word, where)
    found[#found + 1] = word
    found[#found + 1] = where
    return mends
  end
  clock()
  local held = redis.pcall("HMGET", name, unpack(state))
  if held.err then
    surely(held, name)
    wrong_type(held)
    report("wrong type", name)
    if removes then redis.call("UNLINK", name) end
    return found
  end
  local id, ended, ttl = held[1], held[2], redis.call("PTTL", name)
  spent = spent + 4
  if ttl == -2 then
    surely(nil, name)
    return found
  end
  local arrives = partitioned and held[5 + references]
  if not ended and id ~= string.sub(name, #session_stem + 1, -1 - #ending) then
    report("stray", name)
    if removes then redis.call("UNLINK", name) end
    return found
  end
  local session = { key = name, ttl = ttl, held = held }
  if ttl == -1 then
    if not ended then session.ttl = lifetime(session) end
    if report("endless", name) then redis.call("PEXPIREAT", name, now + (ended and tombstone or session.ttl)) end
  end
  for n = 1, not ended and not arrives and references or 0 do
    local sets = sets_in(session, n)
    spent = spent + 3 * #sets
    for i = 1, #sets do
      local set = sets[i]
      local member = redis.pcall("SISMEMBER", set, id)
      if member ~= 1 then surely(member, set) end
      local unusable = type(member) == "table"
      if unusable then
        wrong_type(member)
        report("wrong type", set)
        if removes then redis.call("UNLINK", set) end
        member = 0
      end
      local before = redis.call("PTTL", set)
      if member == 1 and before >= 0 and before < session.ttl then
        if report("short", set) then outlive(set, session.ttl, before) end
      elseif member == 0 and (not strict or not strict[n] or ARGV[3 + n] == "yes") then
        if report("outside", set) and (removes or not unusable) then
          redis.call("SADD", set, id)
          outlive(set, session.ttl, before)
        end
      end
    end
  end
  return found
end

return each(inspect)
