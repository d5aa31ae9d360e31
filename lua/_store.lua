--[[
  The first lines of every script. Before them stands the schema of the store, written by rss/engine/scripts.py:
    max_age, max_lifetime, tombstone
                      milliseconds: a session lives so long without a write; so long from its creation, 0 for no limit;
                      a tombstone lives so long
    json              true if a reference field holds JSON, false if it holds one text as it stands
    before_value, ending
                      what stands between field and value in the key of a reference set; the end of every key
    state             the fields that describe a session: "id", "_ended", "_created", "_max_age", then each reference
    references        the number of references; the n-th is state[4 + n]
    identity          the number of the reference that is the identity, or false
    strict, limits, refuses
                      lists with an item for each reference: whether it is strict, its limit (0 for none), whether it
                      refuses one more; false if that holds for no reference

  KEYS        key: how many of them have been read
  ARGV        session_stem, the beginning of the key of a session, "rss:{"; set_stem, the beginning of the key of a
              reference set, "rss:"; then what the script says. arg: how many have been read

  Returns nothing: it stands before every script.
]]
local KEYS, ARGV = KEYS, ARGV
local session_stem, set_stem, key, arg = ARGV[1], ARGV[2], 0, 2

-- The estimated microseconds that this script has taken so far: Redis serves nobody else meanwhile. Estimates, because
-- os.clock is missing on Redis 6.2, and TIME stands still inside scripts on 7.4 and later.
local spent, ENOUGH = 0, 2000

-- The key of a session.
local function session_key(id) return session_stem .. id .. ending end

-- The server's time in milliseconds, the same for the whole script. Call it before the first PTTL of a script that
-- computes with both: on Redis 6.2 and 7.0 the time runs on inside scripts.
local now
local function clock()
  if now then return now end
  local time = redis.call("TIME")
  now = time[1] * 1000 + math.floor(time[2] / 1000)
  return now
end

-- A function that undoes the writes of the session at work, or false. `each` calls it if a later write fails.
local undo = false

-- Call a function for each session of the batch. It reads the keys and arguments of one session and returns its reply.
-- The batch ends early when enough time is spent, and where the function fails, as when Redis refuses a write. Sessions
-- without a reply are sent again.
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
