-- maintain reclaims stale tokens, refills the queue in small portions, and trims it. It
-- reads the present state and no past one: to run it twice, or twice at once, does no
-- harm. In the end it calls the waiters that may take a free token.
--
-- It reclaims few tokens at once, so that Redis serves other commands within
-- milliseconds. While stale tokens are left, the caller runs it again. In between, the
-- state is whole.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] length    the caller's
-- ARGV[6] newcomer  "1": the caller was not in line before the last silence, and does not
--                   wait for tokens that Redis may have lost
--
-- Returns {0, time, reclaimed, refilled, trimmed, left}  left: number of tokens that are
--                                                        still stale
local most = 500 -- most stale tokens to reclaim at once

noteLength(tonumber(ARGV[5]))
touch()
clampFuture(KEYS[2])
clampFuture(KEYS[4])
local reclaimed, refilled, left = 0, 0, 0
local before = '(' .. (now - threshold)
if settled() then
  local stale = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', before, 'LIMIT', 0, most)
  reclaimed = #stale
  if reclaimed > 0 then
    local pods, tokens = {}, {}
    for i, name in ipairs(stale) do
      local token = string.match(name, '^[^/]*')
      pods[i], tokens[token] = name .. '/pod', (tokens[token] or 0) + 1
    end
    for i, pod in ipairs(redis.call('HMGET', KEYS[5], unpack(pods))) do
      addHold(pod)
      if tokens[stale[i]] then -- the first of its tokens
        noteEnd('reclaimed', pod, tokens[stale[i]])
      end
    end
    if newHold then
      redis.pcall('HSET', KEYS[6], 'holds', holds) -- a full Redis does without
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
refilled = refill(ARGV[6] == '1')
local trimmed = trim()
callServed()
return finish({0, micros, reclaimed, refilled, trimmed, left})
