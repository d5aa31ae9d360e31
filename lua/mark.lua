--[[
  Write fields of a hash of the library, even if the server is full. Like `open.lua`, it has no shared parts.

  KEYS        the hash: the meta key, or a mark
  ARGV        field, value, ...

  Returns nothing.
]]
redis.call("HDEL", KEYS[1], "") -- A full server refuses only the first write of a script, and never this one.
redis.call("HSET", KEYS[1], unpack(ARGV))
