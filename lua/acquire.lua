-- acquire takes one free token. In the steady state an admission is this script and nothing else.
--
-- KEYS[1] queue     List of the free tokens
-- KEYS[2] inflight  Sorted Set, token -> time of the last heartbeat (Unix seconds, this server's clock)
-- ARGV[1] length           how many tokens the semaphore has
-- ARGV[2] stale threshold  seconds
-- ARGV[3] time to live     seconds, of both keys, renewed by any use
--
-- Returns {0, tokens in use}  full: nothing is free and nothing is to be repaired
--         {1, token}          the token, now in flight
--         {2, missing}        to be maintained first, for which that many fresh tokens are needed
local length = tonumber(ARGV[1])
local now = tonumber(redis.call('TIME')[1])
local queued = redis.call('LLEN', KEYS[1])
local inflight = redis.call('ZCARD', KEYS[2])
local stale = redis.call('ZCOUNT', KEYS[2], '-inf', '(' .. (now - tonumber(ARGV[2])))
local total = queued + inflight

-- More than length with an empty queue is what a late heartbeat or a lowered length leaves: there is
-- nothing to trim, so it is plainly full until enough have been released.
if stale > 0 or total < length or (total > length and queued > 0) then
  return {2, math.max(0, length - queued - (inflight - stale))}
end

local answer = {0, inflight}
if queued > 0 then
  local token = redis.call('LPOP', KEYS[1])
  redis.call('ZADD', KEYS[2], now, token)
  answer = {1, token}
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return answer
