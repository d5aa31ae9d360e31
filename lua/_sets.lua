--[[
  The reference sets of a session, according to its hash.

  KEYS        none
  ARGV        none

  Returns nothing: it stands before the scripts that need it.
]]

-- Return the error of a command if the key has another type. Raise any other error, such as a missing right: it does
-- not mean that there is no session.
local function wrong_type(reply)
  if not string.find(reply.err, "WRONGTYPE") then error(reply.err, 0) end
  return reply
end

-- A list of sets also has its sets as keys, so that `has` need not search. The first set is no key: most lists hold
-- only one set, and `has` compares it. NONE is shared: never change it.
local NONE = {}
local function has(sets, set) return sets[1] == set or sets[set] end

-- Return the set of the n-th reference for the data in its field. Falsy if the data names no set or several. Falsy also
-- for a JSON string with an escape: only a parser can read it.
local function set_of(n, held)
  local first = json and string.byte(held)
  if first == 34 then
    held = string.match(held, '^"([^"\\]+)"$')
  elseif first == 91 or (json and held == "null") then
    return nil
  end
  return held and held ~= "" and set_stem .. state[4 + n] .. before_value .. held .. ending
end

-- Return the sets of the n-th reference for the data in its field. The data is a text, a JSON string, or a JSON list of
-- strings and integers.
local function sets_of(n, held)
  if not held or held == "" or (json and held == "null") then return NONE end
  local set = set_of(n, held)
  if set then return { set } end
  local stem = set_stem .. state[4 + n] .. before_value
  local sets, ok, value = {}, pcall(cjson.decode, held)
  for _, text in ipairs(ok and type(value) == "table" and value or { ok and value or held }) do
    if type(text) == "number" then text = string.format("%.0f", text) end -- tostring would write 1.7e+12.
    if type(text) == "string" then
      set = stem .. text .. ending
      if sets[1] then sets[set] = true end
      sets[#sets + 1] = set
    end
  end
  spent = spent + #sets
  return sets
end

-- Return the sets of the n-th reference that a session is in.
local function sets_in(session, n)
  local fields, field = session.fields, state[4 + n]
  if not fields then return sets_of(n, session.held[4 + n]) end
  for i = 1, #fields, 2 do
    if fields[i] == field then return sets_of(n, fields[i + 1]) end
  end
  return NONE
end
