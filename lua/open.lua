--[[
  Compare a store that opens with the stores that had its prefix before. It runs before all other scripts, without the
  schema and the shared parts.

  KEYS        the meta key, "rss:_meta"
  ARGV        the version of the format of keys and data; the number of partitions, "" for a store without partitions;
              the identity, "" for none; then names and values of other fields, among them "reference:<field>" for each
              reference, with its options in words, and "moving" if sessions move to this store from one without
              partitions

  Returns two lists: the names of the references that the stores before it lacked, and of those that it lacks; or
    RSSOTHER name held
                      if the format, the number of partitions or the identity was another one

  If the meta key does not exist, the prefix is new. Then the store lacks nothing, and nor did any store before it.
  Other values are written anew if they differ: those of the last store to open are kept.
]]
local meta, held, wanted, own, lists = KEYS[1], {}, {}, {}, { {}, {} }
local with_partitions = ARGV[2] ~= ""
local new, fields = redis.call("EXISTS", meta) == 0, redis.call("HGETALL", meta)
for i = 1, #fields, 2 do held[fields[i]] = fields[i + 1] end

local function want(name, value)
  wanted[#wanted + 1] = name
  wanted[#wanted + 1] = value
end

-- Sessions may move from a store without partitions to one with them. Until all have moved, both may open.
for i = 4, #ARGV, 2 do own[ARGV[i]] = true end
local moving = own.moving or held.moving
for i, name in ipairs({ "format", "partitions", "identity" }) do
  local missing, differs = not held[name] and ARGV[i] ~= "", (held[name] or "") ~= ARGV[i]
  if missing and (new or own.moving) then
    want(name, ARGV[i])
  elseif differs and not (moving and name ~= "format" and not with_partitions) then
    return redis.error_reply("RSSOTHER " .. name .. " " .. (held[name] or ""))
  end
end
if held.moving and with_partitions and not own.moving then redis.call("HDEL", meta, "moving") end
for i = 4, #ARGV, 2 do
  local name, value = ARGV[i], ARGV[i + 1]
  local field = string.match(name, "^reference:(.*)")
  if field and not new and not held[name] then
    table.insert(lists[1], field)
  elseif held[name] ~= value then
    want(name, value)
  end
end
for name in pairs(held) do
  local field = string.match(name, "^reference:(.*)")
  if field and not own[name] then table.insert(lists[2], field) end
end

-- A full server refuses only the first write of a script, and never HDEL.
if wanted[1] then
  redis.call("HDEL", meta, "")
  redis.call("HSET", meta, unpack(wanted))
end
return lists
