--[[
  Compare a store that opens with the stores that had its prefix before. It runs before all other scripts, without the
  schema and the shared parts.

  KEYS        the meta key, "rss:_meta"
  ARGV        the version of the format of keys and data; the number of partitions, "" for a store without partitions;
              the identity, "" for none; then names and values of other fields, among them "reference:<field>" for each
              reference, with its options in words

  Returns two lists: the names of the references that the stores before it lacked, and of those that it lacks; or
    RSSOTHER name held
                      if the format, the number of partitions or the identity was another one

  If the meta key does not exist, the prefix is new. Then the store lacks nothing, and nor did any store before it.
  Other values are written anew if they differ: those of the last store to open are kept.
]]
local meta, held, wanted, own, lists = KEYS[1], {}, {}, {}, { {}, {} }
local new, fields = redis.call("EXISTS", meta) == 0, redis.call("HGETALL", meta)
for i = 1, #fields, 2 do held[fields[i]] = fields[i + 1] end

local function want(name, value)
  wanted[#wanted + 1] = name
  wanted[#wanted + 1] = value
end

for i, name in ipairs({ "format", ARGV[2] ~= "" and "partitions", ARGV[2] ~= "" and "identity" }) do
  if name and not held[name] then
    want(name, ARGV[i])
  elseif name and held[name] ~= ARGV[i] then
    return redis.error_reply("RSSOTHER " .. name .. " " .. held[name])
  end
end
for i = 4, #ARGV, 2 do
  local name, value = ARGV[i], ARGV[i + 1]
  local field = string.match(name, "^reference:(.*)")
  own[name] = true
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
