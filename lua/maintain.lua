-- maintain reclaims stale tokens, refills the queue in a small portion, and trims it. It looks at what is there and not at what
-- was: to run it twice, or twice at once, does no harm. Those first in line are called for what is free then.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] length    how many tokens the semaphore has
-- ARGV[6] newcomer  "1": whoever asks has not been in line before, and does not wait for tokens that may have been lost
--
-- Returns {0, time, reclaimed, refilled, trimmed}
local length = tonumber(ARGV[5])
local portion = 256 -- of free tokens, at most, that are made for those who may come

ask(length)
touch()
catchUp(KEYS[2])
catchUp(KEYS[4])
local reclaimed, refilled = 0, 0
if settled() then
  local stale = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', '(' .. (now - threshold))
  for i = 1, #stale, 1000 do
    local pods = {}
    for j = i, math.min(#stale, i + 999) do
      pods[#pods + 1] = stale[j] .. '/pod'
    end
    redis.call('HDEL', KEYS[5], unpack(pods))
  end
  reclaimed = redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. (now - threshold))
  if reclaimed > 0 then
    count('reclaimed', reclaimed)
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
return finish({0, micros, reclaimed, refilled, trimmed})
