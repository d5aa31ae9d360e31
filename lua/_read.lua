--[[
  Reading fields of sessions: all, or some of them. Needs session.

  KEYS        none
  ARGV        the stems, then
    fields            "all", or their number and their names

  Returns nothing: it stands before the scripts that need it.
]]
local all = ARGV[3] == "all"
local count, more = not all and tonumber(ARGV[3]) or 0, state
arg = 3 + count

-- The maximum number of fields in one command, together with the state. `unpack` fails at 8,000 items.
local AT_ONCE = 900

if count > 0 then
  more = { unpack(state) }
  for i = 1, math.min(count, AT_ONCE) do more[#state + i] = ARGV[3 + i] end
end

-- Return the wanted fields of a session and its id: field, value, ... The session was looked up with `all, more`.
local function read(session)
  if all then return session.fields end
  local list, held, n, offset = { "id", session.held[1] }, session.held, 2, #state
  spent = spent + count * (count > 128 and 1.2 or 0.3)
  for i = 1, count do
    if i > AT_ONCE and i % AT_ONCE == 1 then
      held = redis.call("HMGET", session.key, unpack(ARGV, 3 + i, 2 + math.min(i + AT_ONCE, 1 + count)))
      offset = 1 - i
    end
    local value = held[i + offset]
    if value then
      list[n + 1], list[n + 2] = ARGV[3 + i], value
      n = n + 2
      spent = spent + #value * 0.015
    end
  end
  return list
end

-- Return the reply for a session that cannot be read. Nil if it can.
local function unreadable(session)
  if not session or session.ended == ARRIVING then return { "absent" } end
  if session.err then return session end
  if session.ended then return { session.ended, "ended" } end
end

-- Append the TTL and a word for the state of a session to its fields.
local function describe(fields, ttl, word)
  local n = #fields
  fields[n + 1], fields[n + 2] = ttl, word
  return fields
end
