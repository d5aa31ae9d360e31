--[[
  End a page of the sessions that were in a reference set when the first page began. Optionally block the value.
  `_fence.lua` lists the fields of the fence. Needs session, write, end, fence, page, rounds.

  KEYS        the reference set, "rss:<field>:{<value>}"; its fence, "rss:_fence:<field>:{<value>}"
  ARGV        the stems, then
    reference         the number of its reference
    cursor            "0", or what the last page returned. "end": all pages are done
    page              the approximate number of sessions in a page
    left              number of ids that the last page left, then the ids. If there are any, they are this page
    token             the name of this call, the same for all of its pages
    reason            the reason in the tombstones, "deleted"
    tell              "tell" to publish an event of the block; otherwise "silent"
    block             milliseconds for which to block the value, from the first page on; or "open" for no block
    required          "required" to end nothing if a session to keep is not alive; otherwise "optional"
    keep              number of ids to keep, then the ids

  Returns the cursor of the next page, "0" after the last; the ids that this page left, because its time was spent; and
  the number of sessions that it ended. After several pages, the cursor is "end", not "0". The caller sends it back, and
  the call is done if this is still the server that returned it, or has all of its writes. Otherwise the call begins
  anew, in its round. On the first page, it may return
    RSSNOTFOUND       if there is no session with a required id
    RSSENDED reason   if it was ended

  A call that needs several pages gets a round in the fence: the number of such calls so far. A session that joins the
  set is marked with the latest round. A call spares sessions that joined in its round or later, and those to keep. When
  no call is open, the marks are removed.
]]
local set, fence, n, cursor = KEYS[1], KEYS[2], tonumber(ARGV[3]), ARGV[4]
local page, left = tonumber(ARGV[5]), tonumber(ARGV[6])
arg = 6
local ids = args(left)
local token, reason, told, block = ARGV[arg + 1], ARGV[arg + 2], ARGV[arg + 3] == "tell", tonumber(ARGV[arg + 4])
local required, kept = ARGV[arg + 5] == "required", tonumber(ARGV[arg + 6])
arg = arg + 6

-- Block the value. A longer block stays as it is.
local function close()
  allow_writes(fence, token)
  local till = clock() + block
  local before = tonumber(redis.call("HGET", fence, "until") or 0)
  if till > before then redis.call("HSET", fence, "until", till, "why", reason) end
  keep_fence(fence)
  if tell and told then tell("blocked", set, reason, string.format("%.0f", till)) end
end

-- Return the ids to keep. On the first page, include the ids that they lead to. Later pages find marks of both. Returns
-- an error if a required session is not alive.
local function read_keep(first_page)
  local keep = args(kept)
  for i = 1, first_page and #keep or 0 do
    local session = find(session_key(keep[i]))
    local refused = required and refusal(session)
    if refused then return refused end
    if session and session.ttl and session.held[1] ~= keep[i] then keep[#keep + 1] = session.held[1] end
  end
  return keep
end

-- A fence never stays without a TTL.
local function drop_fence() return redis.pcall("PTTL", fence) == -1 and redis.pcall("UNLINK", fence) end

local function delete_by()
  key = 2
  undo = drop_fence
  local size = redis.pcall("SCARD", set)
  if type(size) == "table" then return size end
  local round, ended, spared = redis.call("HGET", fence, "call:" .. token), 0, {}
  if cursor == "end" and round and round ~= "done" then
    if is_at_end(fence, token) then finish(fence, token, round) else cursor = "0" end
  end
  if round == "done" or cursor == "end" then return { "0", {}, 0 } end
  local keep = read_keep(not round)
  if keep.err then return keep end
  for _, id in ipairs(keep) do spared[id] = true end
  if round then keep_fence(fence) elseif block then close() end
  round = tonumber(round or nil) or size > page and begin(fence, token, reason, keep)

  if left == 0 then
    local scanned = round and redis.call("SSCAN", set, cursor, "COUNT", page)
    cursor, ids = scanned and scanned[1] or "0", scanned and scanned[2] or redis.call("SMEMBERS", set)
  end
  local rest = each_of(ids, function(id)
    local mark = round and redis.call("HGET", fence, "id:" .. id)
    if spared[id] or (mark and spares(mark, round)) then return end
    local session = member(id, n, set)
    if not session then return leave(set, id) end
    bury(session, reason_for(session, reason))
    if mark then redis.call("HDEL", fence, "id:" .. id) end
    if not session.ended then ended = ended + 1 end
  end)
  if #rest > 0 and not round then begin(fence, token, reason, keep) end
  if #rest == 0 and round and cursor == "0" then
    cursor = "end"
    note_end(fence, token)
  end
  return { cursor, rest, ended }
end

return each(delete_by)
