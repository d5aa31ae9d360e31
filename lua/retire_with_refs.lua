--[[
  End sessions that have been copied to another partition, under another id. If a reference of a session has changed
  since then, or a field of ours, its copy is in the wrong sets: the session stays. Needs move.

  KEYS        for each session: its hash, "rss:{<tag>}:s:<id>"
  ARGV        the stems, then for each session
    id                the id of the copy
    copy              its name, as `arrive_with_refs` got it
    fields            their number, names included, then field, value, ... as they were when they were copied

  Returns for each session the TTL in milliseconds that it had, the name of the copy, a list of field, value, ... that
  have changed since it was copied, and a list of fields that are gone since then; or
    "stays"           if it stays; or
    RSSNOTFOUND       if there is none
    RSSENDED reason   if it was ended, even by this call, while delete_by_ref works through one of its sets

  The tombstone keeps the reply for a second run, also of a call with another copy under the same id: `_to`, the id of
  the copy; `_copy`, its name; `_expires`, the time in milliseconds at which the session would have expired; the changed
  fields; and `_gone:<field>` for each field that is gone.
]]

-- Return what has changed since the copy ARGV[first] to ARGV[last]: field, value, ...; then the fields that are gone.
-- Falsy if a reference or a field of ours has changed.
local function changes(session, first, last)
  local fields, copied, values, gone, fixed = session.fields, {}, {}, {}, { id = true }
  for n = 1, references do fixed[state[4 + n]] = true end
  for i = first, last, 2 do copied[ARGV[i]] = ARGV[i + 1] end
  for i = 1, #fields, 2 do
    local field, value = fields[i], fields[i + 1]
    if copied[field] ~= value then
      if fixed[field] or string.byte(field) == 95 then return nil end
      values[#values + 1], values[#values + 2] = field, value
    end
    copied[field] = nil
  end
  for field in pairs(copied) do
    if fixed[field] or string.byte(field) == 95 then return nil end
    gone[#gone + 1] = field
  end
  return values, gone
end

-- Return the reply of the first run from the tombstone. Falsy if another call made the tombstone.
local function replied(name, id)
  local noted, ttl, copy, values, gone = redis.call("HGETALL", name), nil, nil, {}, {}
  clock()
  for i = 1, #noted, 2 do
    local field, value = noted[i], noted[i + 1]
    if field == "_to" and value ~= id then return nil end
    if field == "_expires" then
      ttl = math.max(1, value - now)
    elseif field == "_copy" then
      copy = value
    elseif string.sub(field, 1, 6) == "_gone:" then
      gone[#gone + 1] = string.sub(field, 7)
    elseif string.byte(field) ~= 95 then
      values[#values + 1], values[#values + 2] = field, value
    end
  end
  return ttl and copy and { ttl, copy, values, gone }
end

local function retire()
  local name, id, copy, first = KEYS[key + 1], ARGV[arg + 1], ARGV[arg + 2], arg + 4
  local last = first + ARGV[arg + 3] - 1
  key, arg = key + 1, last
  spent = spent + (last - first) * 0.5
  local session = look(name, true)
  local before = session and session.ended == "rotated" and replied(name, id)
  if before then return before end
  local refused = refusal(session)
  if refused then return refused end
  local values, gone = changes(session, first, last)
  if not values then return "stays" end

  if not session.held then detail(session) end
  local plan = { id = id, fences = {} }
  for n = 1, references do
    for _, set in ipairs(sets_in(session, n)) do plan.fences[#plan.fences + 1] = fence_of(set) end
  end
  local failed = pass_fences(plan, session, 0)
  if failed then return failed end
  session.moves = true
  bury(session, "rotated")
  redis.call("HSET", name, "_to", id, "_copy", copy, "_expires", now + session.ttl)
  spread("HSET", name, values, 1, #values)
  for i = 1, #gone do redis.call("HSET", name, "_gone:" .. gone[i], "") end
  if tell then tell("rotated", session.held[1], id) end
  return { session.ttl, copy, values, gone }
end

return each(retire)
