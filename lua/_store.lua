--[[
  The first lines of every script. They follow the schema of the store, which rss/engine/scripts.py writes:
    max_age, max_lifetime, tombstone
                      milliseconds: the lifetime of a session without a write; its maximum lifetime from its creation, 0
                      for none; the lifetime of a tombstone
    json              true if a reference field holds JSON, false if it holds one plain text
    before_value, ending
                      the characters between field and value in the key of a reference set; the end of every key
    state             the fields that describe a session: "id", "_ended", "_created", "_max_age", then each reference
    references        the number of references; the n-th is state[4 + n]
    identity          the number of the reference that is the identity, or false
    strict, limits, refuses
                      lists with an item for each reference: whether it is strict; its limit, 0 for none; whether it
                      refuses a session beyond the limit. False instead of a list without a true or positive item
    events            true if the scripts publish events
    partitioned       true if the keys are in partitions, whose slots may move between the masters of a Redis Cluster
    asked             true if this script runs on the master to which a slot moves, after ASKING

  KEYS        key: how many of them have been read
  ARGV        session_stem, the beginning of the key of a session, "rss:{"; set_stem, the beginning of the key of a
              reference set, "rss:"; then the arguments of the script. arg: how many have been read

  Returns nothing: it stands before every script.
]]
local KEYS, ARGV = KEYS, ARGV
local session_stem, set_stem, key, arg = ARGV[1], ARGV[2], 0, 2

-- `spent` is the estimated number of microseconds that this script has taken. The script stops at ENOUGH, because Redis
-- serves no other client meanwhile. The time cannot be measured: Redis 6.2 lacks os.clock, and since 7.4 TIME stands
-- still in scripts.
local spent, ENOUGH = 0, 2000

-- Return the key of a session.
local function session_key(id) return session_stem .. id .. ending end

-- Return the server's time in milliseconds. It is the same for the whole script. A script that computes with this time
-- and a PTTL must call `clock` before PTTL. On Redis 6.2 and 7.0 the time runs on inside scripts.
local now
local function clock()
  if now then return now end
  local time = redis.call("TIME")
  now = time[1] * 1000 + math.floor(time[2] / 1000)
  return now
end

-- Whether a reply is the error for a key that is on another master, because the slot moves at the moment.
local function elsewhere(reply)
  local err = partitioned and type(reply) == "table" and reply.err
  return err and (string.find(err, "non local key") or string.find(err, "undeclared keys"))
end

-- Call this before the script concludes anything from a reply that says that a key is absent. While the slot moves, the
-- key may be on the other master. Then the script stops, before it writes, and the engine runs it again later.
local LATER = "RSSLATER perhaps a non local key"
local function surely(reply, name)
  if elsewhere(reply) or asked and redis.call("EXISTS", name) == 0 then error(LATER, 0) end
end

-- Run a command and return its reply, as redis.call does. If a key is on the other master, stop as `surely` does.
local function inquire(...)
  local reply = redis.pcall(...)
  if type(reply) == "table" and reply.err then error(elsewhere(reply) and LATER or reply.err, 0) end
  return reply
end

-- A function that undoes the writes of the current session, or false. `each` calls it if a later write fails.
local undo = false

-- Call a function for each session of the batch. The function reads the keys and arguments of one session, and returns
-- its reply. The batch ends early when enough time is spent, or when the function fails, as when Redis refuses a write.
-- The engine sends sessions without a reply again.
local function each(run)
  local replies, n = {}, 0
  repeat
    local done, reply = pcall(run)
    if not done then
      if undo then undo() end
      if n == 0 then error(reply, 0) end
      break
    end
    n = n + 1
    replies[n] = reply
  until key >= #KEYS or spent >= ENOUGH
  return replies
end
