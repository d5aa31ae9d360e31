--[[
  Read a page of the sessions in a reference set, and remove the ids of sessions that are gone. Needs read, page.

  KEYS        the reference set, "rss:<field>:{<value>}"
  ARGV        the stems, then
    fields            "all", or their number and their names
    reference         the number of its reference
    cursor            "0", or what the last page returned
    page              the approximate number of sessions in a page
    left              number of ids that the last page left, then the ids. If there are any, they are this page

  Returns the cursor of the next page, "0" after the last; the ids that this page left, because its time was spent; then
  for each session a list of field, value, ... with its id.
    If the set grows or shrinks between two pages, a session may be on both.
]]
local function find_by()
  local set, n, cursor, page = KEYS[key + 1], tonumber(ARGV[arg + 1]), ARGV[arg + 2], ARGV[arg + 3]
  local left = tonumber(ARGV[arg + 4])
  key, arg = key + 1, arg + 4
  local ids = args(left)
  if left == 0 then
    local scanned = redis.pcall("SSCAN", set, cursor, "COUNT", page)
    if scanned.err then return scanned end
    cursor, ids = scanned[1], scanned[2]
  end

  local reply = { cursor, false }
  reply[2] = each_of(ids, function(id)
    local session = member(id, n, set, all, more)
    if session and not session.ended then
      reply[#reply + 1] = read(session)
    elseif not session then
      redis.pcall("SREM", set, id) -- Ignore an error: the page can be read without this write.
    end
  end)
  return reply
end

return each(find_by)
