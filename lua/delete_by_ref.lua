--[[
  End a page of the sessions in a reference set: on the whole, those that were in it when the first page was.
  Needs _lifetime.lua.

  KEYS        the reference set, "rss:<field>:{<value>}"; its fence, "rss:_fence:<field>:{<value>}"
  ARGV        what _store.lua reads, then
    reference         the number of its reference
    cursor            "0", or what the last page returned
    page              about how many to look at
    token             names this call on all its pages
    reason            what the tombstones will say, "deleted"
    keep              number of ids to spare, then the ids

  Returns the cursor of the next page, "0" after the last; and how many were ended.

  A set that is larger than a page takes several scripts. Meanwhile its fence, a hash, tells in which round a session
  joined: rounds are counted by the calls that begin, and a call spares those that joined in its own or a later one.
]]
local function read_page(set, cursor, page, fenced)
  if not fenced then return { "0", redis.call("SMEMBERS", set) } end
  return redis.call("SSCAN", set, cursor, "COUNT", page)
end

local function begin(fence, token, reason, keep)
  -- Sessions must end also where memory has: there a script may only add if something was removed before it.
  redis.call("HDEL", fence, "call:" .. token)
  local round = redis.call("HINCRBY", fence, "round", 1)
  redis.call("HSET", fence, "call:" .. token, round, "reason", reason)
  for _, id in ipairs(keep) do redis.call("HSET", fence, "id:" .. id, round) end
  return round
end

local function delete_by()
  local set, fence, n, cursor, page, token, reason = key(), key(), number(), arg(), number(), arg(), arg()
  local keep, kept, ended = args(number()), {}, 0
  for _, id in ipairs(keep) do kept[id] = true end

  local size = redis.pcall("SCARD", set)
  if type(size) == "table" then return size end
  local round = tonumber(redis.call("HGET", fence, "call:" .. token))
  if not round and size > page then round = begin(fence, token, reason, keep) end
  if round then redis.call("PEXPIRE", fence, tombstone) end

  local scanned = read_page(set, cursor, page, round)
  for _, id in ipairs(scanned[2]) do
    local joined = round and redis.call("HGET", fence, "id:" .. id)
    if not kept[id] and not (joined and tonumber(joined) >= round) then
      local session = belongs(id, n, set)
      if session then
        bury(session, reason)
        ended = ended + 1
      else
        leave(set, id)
      end
    end
  end
  return { scanned[1], ended }
end

return each(delete_by)
