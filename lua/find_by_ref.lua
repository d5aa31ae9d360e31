--[[
  Read a page of the sessions in a reference set, and let go of the ids in it whose session is gone. Needs _session.lua.

  KEYS        the reference set, "rss:<field>:{<value>}"
  ARGV        what _store.lua reads, then
    reference         the number of its reference
    cursor            "0", or what the last page returned
    page              about how many to look at
    fields            their number, -1 for all; then their names

  Returns the cursor of the next page, "0" after the last; then for each session a list of field, value, ... with its id
    A session may be on two pages if the set grows or shrinks in between.
]]
local function find_by()
  local set, n, cursor, page, count = key(), number(), arg(), arg(), number()
  local fields = count >= 0 and args(count)
  local scanned = redis.pcall("SSCAN", set, cursor, "COUNT", page)
  if scanned.err then return scanned end

  local reply = { scanned[1] }
  for _, id in ipairs(scanned[2]) do
    local session = belongs(id, n, set, not fields)
    if session then
      append(reply, read(session, fields))
    else
      redis.pcall("SREM", set, id) -- A server that takes no writes can still be read.
    end
  end
  return reply
end

return each(find_by)
