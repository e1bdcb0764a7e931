-- maintain reclaims stale tokens, refills the queue in a small portion, and trims it. It looks at what is there and not at what
-- was: to run it twice, or twice at once, does no harm. Those first in line are called for what is free then.
--
-- It reclaims so few at once that Redis goes on within milliseconds. Where stale ones are left, it is to be run again; what is there
-- meanwhile is whole.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] length    how many tokens the semaphore has
-- ARGV[6] newcomer  "1": whoever asks has not been in line before, and does not wait for tokens that may have been lost
--
-- Returns {0, time, reclaimed, refilled, trimmed, left}  left: how many are still stale
local length = tonumber(ARGV[5])
local portion = 256 -- of free tokens, at most, that are made for those who may come
local most = 500 -- stale tokens that are reclaimed at once

ask(length)
touch()
catchUp(KEYS[2])
catchUp(KEYS[4])
local reclaimed, refilled, left = 0, 0, 0
local before = '(' .. (now - threshold)
if settled() then
  local stale = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', before, 'LIMIT', 0, most)
  reclaimed = #stale
  if reclaimed > 0 then
    local pods = {}
    for i, token in ipairs(stale) do
      pods[i] = token .. '/pod'
    end
    redis.call('HDEL', KEYS[5], unpack(pods))
    count('reclaimed', reclaimed)
  end
  if reclaimed < most then
    redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', before)
  else
    redis.call('ZREM', KEYS[2], unpack(stale))
    left = redis.call('ZCOUNT', KEYS[2], '-inf', before)
  end
end
if mayRefill(ARGV[6] == '1') then
  local wanted = math.min(portion, length - redis.call('ZCARD', KEYS[2]))
  local free = {}
  for i = 1, wanted - redis.call('LLEN', KEYS[1]) do
    free[i] = 'free'
  end
  refilled = #free
  if refilled > 0 then
    grown = true
    redis.call('RPUSH', KEYS[1], unpack(free))
  end
end
local trimmed = trim()
call()
return finish({0, micros, reclaimed, refilled, trimmed, left})
