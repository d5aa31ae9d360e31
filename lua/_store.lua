--[[
  The first lines of every script: its arguments one by one, how the store is configured, the names of its keys.

  KEYS        read with key()
  ARGV        read with arg(); first of all, how the store is configured:
    prefix            "rss"
    max_age           milliseconds that a session lives without a write, unless it was given a time of its own
    max_lifetime      longest life of a session from its creation, milliseconds; 0 for no limit
    tombstone         life of a tombstone, milliseconds
    encoding          "json", or "text" if a reference field holds one value as it stands
    references        their number, then for each its field, its limit (0 for none), "evict" or "refuse" at that
                      limit, and "strict" or "lax"

  Returns nothing: it stands in front of all others.
]]
local keys_read, args_read = 0, 0

local function key()
  keys_read = keys_read + 1
  return KEYS[keys_read]
end

local function arg()
  args_read = args_read + 1
  return ARGV[args_read]
end

local function number() return tonumber(arg()) end

local function args(n)
  if n == 0 then return {} end
  args_read = args_read + n
  if n <= 1000 then return { unpack(ARGV, args_read - n + 1, args_read) } end
  local list = {}
  for i = 1, n do list[i] = ARGV[args_read - n + i] end
  return list
end

local function append(list, first, second)
  list[#list + 1] = first
  list[#list + 1] = second
end

-- Call a command on a key with all of a list: unpack fails at 8,000, so in pieces.
local function spread(command, name, list)
  for i = 1, #list, 1000 do redis.call(command, name, unpack(list, i, math.min(i + 999, #list))) end
end

-- What a batch has done so far beyond the usual: bytes read and written, or what takes as long.
local done_so_far = 0
local function weigh(bytes) done_so_far = done_so_far + bytes end

-- Run a function for each session of the batch: it reads the keys and arguments of one, and returns its reply. When
-- enough is done, the batch ends, that nobody else waits long; it does also where the function fails, as when Redis
-- refuses a write: the sessions that got no reply are sent again.
local function each(run)
  local replies = {}
  while keys_read < #KEYS and done_so_far < 131072 do
    local done, reply = pcall(run)
    if not done and #replies == 0 then error(reply, 0) end
    if not done then break end
    replies[#replies + 1] = reply
  end
  return replies
end

local prefix, default_age, max_lifetime, tombstone, encoding = arg(), number(), number(), arg(), arg()
local refs = {}
for i = 1, number() do
  refs[i] = { field = arg(), limit = number(), on_limit = arg(), strict = arg() == "strict" }
  refs[i].stem = prefix .. ":" .. refs[i].field .. ":{"
end

local clock = redis.call("TIME")
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- As a text: Lua itself would write 1.7e+12.
local function integer(n) return string.format("%.0f", n) end

local function session_key(id) return prefix .. ":{" .. id .. "}" end
local function id_of(name) return string.sub(name, #prefix + 3, -2) end

-- Reference sets: a list that also has each set as a key, but for the first, which is hardly ever not the only one.
local function add(sets, set)
  if sets[1] then sets[set] = true end
  sets[#sets + 1] = set
end

local function has(sets, set) return sets[1] == set or sets[set] end

-- For each reference how many sets the new values of a session name, -1 if its field is not written.
local function read_counts()
  local counts = {}
  for i = 1, #refs do counts[i] = number() end
  return counts
end

-- The sets of each reference that a session is to be in; false for those whose field is not written.
local function read_sets(counts)
  local sets = {}
  for i = 1, #refs do
    sets[i] = counts[i] >= 0 and { counts[i] > 0 and key() or nil }
    for _ = 2, counts[i] do add(sets[i], key()) end
  end
  return sets
end

-- The sets of a reference for what its field holds: a text, a JSON string or a JSON list of texts and integers.
local function sets_of(ref, held)
  local first = held and string.byte(held)
  if not first or (encoding == "json" and held == "null") then return {} end
  if encoding ~= "json" or (first ~= 34 and first ~= 91) then return { ref.stem .. held .. "}" } end
  local sets, ok, value = {}, pcall(cjson.decode, held)
  for _, text in ipairs(ok and type(value) == "table" and value or { ok and value or held }) do
    if type(text) == "number" then text = integer(text) end
    if type(text) == "string" then add(sets, ref.stem .. text .. "}") end
  end
  return sets
end

-- Where delete_by_ref, while it works through a large set, finds the sessions that joined after it began.
local function fence_of(set) return prefix .. ":_fence" .. string.sub(set, #prefix + 1) end
