-- keep keeps the places of many pods in line at once, for a process that stands there for them. It takes no token: whoever is served asks for
-- his by acquire. A place is where the pod's arrival says, whenever it is told: it survives whatever has forgotten it. And it takes out of
-- the line who is gone, but gives no token back.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] known   created, as it was answered before (Unix seconds); 0 for who asks for the first time
-- ARGV[6] gone    how many leave
-- ARGV[7...]      their tokens, and then of each pod that stands: token, arrival (Unix microseconds), length, "NAME NODE" or what is
--                 known of it
--
-- Returns {1, time, created, tokens in use, waiters, served, held, joined}. Lists: served are the tokens in line, also of others, that
-- a free one is left for; held those of the pods that are in flight already; joined of those that were not in line the token and
-- its position, one after the other
local known = tonumber(ARGV[5])
if known > 0 and (not state[1] or created > known) then
  tellLoss()
end
touch()
catchUp(KEYS[2])
catchUp(KEYS[4])
local held, new = {}, {}
local first = 7 + tonumber(ARGV[6])
for i = 7, first - 1 do
  if redis.call('ZSCORE', KEYS[3], ARGV[i]) then -- else it may hold the token, and have a name
    leave(ARGV[i])
  end
end
for i = first, #ARGV, 4 do
  local token, arrival = ARGV[i], ARGV[i + 1]
  if redis.call('ZSCORE', KEYS[2], token) then
    held[#held + 1] = token
  else
    local place = redis.call('ZSCORE', KEYS[3], token)
    if not place or tonumber(place) > tonumber(arrival) then
      grown = true
      redis.call('ZADD', KEYS[3], arrival, token)
      redis.call('HSET', KEYS[5], token, ARGV[i + 2])
      tell(token, ARGV[i + 3], 0)
    end
    redis.call('ZADD', KEYS[4], now, token)
    if not place then
      new[#new + 1] = token
    end
  end
end
line = redis.call('ZCARD', KEYS[3])
dropGone()
if first > 7 then
  call()
end
local joined, free = {}, {}
for _, token in ipairs(new) do
  joined[#joined + 1] = token
  joined[#joined + 1] = (redis.call('ZRANK', KEYS[3], token) or 0) + 1
end
served(function(token)
  free[#free + 1] = token
end, 100)
return finish({1, micros, created, redis.call('ZCARD', KEYS[2]), redis.call('ZCARD', KEYS[3]), free, held, joined})
