-- maintain reclaims stale tokens, then refills or trims the queue until queue + inflight is length.
-- It looks at what is there and not at what was: to run it twice, or twice at once, does no harm. Those first in line are
-- called for what is free then.
--
-- KEYS    see line.lua
-- ARGV[1] length           how many tokens the semaphore has
-- ARGV[2] stale threshold  seconds
-- ARGV[3] time to live     seconds, of all keys, renewed by any use
-- ARGV[4..] fresh tokens   as many as may be missing; those not needed are dropped
--
-- Returns {reclaimed, refilled, trimmed}
local length = tonumber(ARGV[1])
local reclaimed = redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. (now - tonumber(ARGV[2])))
local queued = redis.call('LLEN', KEYS[1])
local free = math.max(0, length - redis.call('ZCARD', KEYS[2])) -- what the queue should hold

local trimmed = math.max(0, queued - free)
if trimmed > 0 then
  -- LTRIM 0 -1 would keep all, so that an empty queue has to be asked for in another way.
  if free == 0 then
    redis.call('DEL', KEYS[1])
  else
    redis.call('LTRIM', KEYS[1], 0, free - 1)
  end
end

local refilled = math.max(0, math.min(free - queued, #ARGV - 3))
-- In portions: Lua cannot unpack 10,000 values at once.
for first = 4, 3 + refilled, 1000 do
  redis.call('RPUSH', KEYS[1], unpack(ARGV, first, math.min(first + 999, 3 + refilled)))
end

call()
renew(ARGV[3])
return {reclaimed, refilled, trimmed}
