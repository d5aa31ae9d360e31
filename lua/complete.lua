--[[
  Remove marks of incomplete references.

  KEYS        for each mark: the hash in a partition, "rss:_meta"
  ARGV        the stems, then for each mark
    field             the field of the mark
    token             what reindexing wrote into it when it began

  Returns for each mark 1 if it was removed, 0 if a store has marked the reference anew since then.
]]
local function complete()
  key, arg = key + 1, arg + 2
  if inquire("HGET", KEYS[key], ARGV[arg - 1]) ~= ARGV[arg] then
    surely(nil, KEYS[key])
    return 0
  end
  return redis.call("HDEL", KEYS[key], ARGV[arg - 1])
end

return each(complete)
