--[[
  Look for what is wrong with a page of reference sets, and mend it if wanted. Needs sets, session, renew, tell, page.

  KEYS        for each page: its reference set, "rss:<field>:{<value>}"
  ARGV        the stems, then
    mode              "check"; "mend"; or "mend_and_remove", which also removes the keys that cannot be mended
    page              the approximate number of ids in a page; then for each page
    reference         the number of its reference
    cursor            "0", or what the last page returned
    left              number of ids that the last page left, then the ids. If there are any, they are this page

  Returns for each page the cursor of the next one, "0" after the last; the ids that this page left, because its time
  was spent; how many ids of it belong to no session that names the set, which are removed; then what else was wrong:
    "wrong type"      the key holds another type of data: it is removed if wanted
    "endless"         the set has no TTL: it gets one
    "short"           the set would expire before a session in it: it lives longer
    If it is not certain that an id belongs to no session, the id stays.
]]
local mends, page = ARGV[3] ~= "check", ARGV[4]
spent = ENOUGH - 300 -- A batch ends after about a third of a millisecond: nobody waits for it.
arg = 4

local function inspect_ref()
  local set, n, cursor, left = KEYS[key + 1], tonumber(ARGV[arg + 1]), ARGV[arg + 2], tonumber(ARGV[arg + 3])
  key, arg = key + 1, arg + 3
  local ids, dead, short = args(left), {}, false
  clock()
  local ttl = redis.call("PTTL", set)
  if left == 0 then
    local scanned = redis.pcall("SSCAN", set, cursor, "COUNT", page)
    if scanned.err then
      surely(scanned, set)
      wrong_type(scanned)
      if ARGV[3] == "mend_and_remove" then redis.call("UNLINK", set) end
      return { "0", {}, 0, "wrong type" }
    end
    cursor, ids = scanned[1], scanned[2]
  end
  local reply = { cursor, false, 0 }
  if ttl == -2 then surely(nil, set) end
  if ttl == -1 then
    reply[4] = "endless"
    if mends then
      redis.call("PEXPIREAT", set, now + max_age)
      ttl = max_age
    end
  end
  reply[2] = each_of(ids, function(id)
    local name = session_key(id)
    local session = look(name)
    spent = spent + 3
    if not session then surely(nil, name) end
    if not session and redis.call("PTTL", name) == -1 then return end -- It is endless: `inspect` mends it.
    if not session or not session.err and not (session.ttl and has(sets_in(session, n), set)) then
      dead[#dead + 1] = id
    elseif session.ttl and ttl >= 0 and ttl < session.ttl then
      short = true
      if mends then outlive(set, session.ttl, redis.call("PTTL", set)) end
    end
  end)
  if short then reply[#reply + 1] = "short" end
  reply[3] = #dead
  if mends and dead[1] then redis.call("SREM", set, unpack(dead)) end
  for i = 1, tell and mends and n == identity and #dead or 0 do
    if redis.call("EXISTS", session_key(dead[i])) == 0 then tell("ended", dead[i], "expired", "") end
  end
  return reply
end

return each(inspect_ref)
