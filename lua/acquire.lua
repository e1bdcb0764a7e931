-- acquire takes one free token, under a name that the caller chooses: to ask again with the same name is safe. In the
-- steady state an admission is this script and nothing else.
--
-- Who waits joins the line and keeps its place by asking again. Who does not wait gets only what the line leaves.
--
-- KEYS    see line.lua
-- ARGV[1] length           how many tokens the semaphore has
-- ARGV[2] stale threshold  seconds
-- ARGV[3] time to live     seconds, of all keys, renewed by any use
-- ARGV[4] token            the name; nobody else ever uses it
-- ARGV[5] arrival          empty: does not wait; "0": joins the line; else as it was answered before
-- ARGV[6] patience         seconds after which a waiter that has not asked again is dropped
--
-- Returns {0, tokens in use, waiters, position, arrival, seconds waited, seconds until a token may be stale, reachable}
--                               full: nothing is free and nothing is to be repaired. From position on only for who waits
--         {1}                   the token is in flight
--         {2, missing, stale}   to be maintained first, for which that many fresh tokens are needed
local length = tonumber(ARGV[1])
local threshold = tonumber(ARGV[2])
local token = ARGV[4]
local waits = ARGV[5] ~= ''

local function answer(values)
  renew(ARGV[3])
  return values
end

local function take()
  redis.call('ZADD', KEYS[2], now, token)
  leave(token)
  return answer({1})
end

if redis.call('ZSCORE', KEYS[2], token) then
  return take()
end

for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', '(' .. (now - tonumber(ARGV[6])), 'LIMIT', 0, 1000)) do
  leave(gone)
end
if waits then
  local arrival = ARGV[5]
  if arrival == '0' then
    arrival = time[1] .. string.format('%06d', tonumber(time[2]))
  end
  redis.call('ZADD', KEYS[3], 'NX', arrival, token)
  redis.call('ZADD', KEYS[4], now, token)
end

local queued = redis.call('LLEN', KEYS[1])
local inflight = redis.call('ZCARD', KEYS[2])
local stale = redis.call('ZCOUNT', KEYS[2], '-inf', '(' .. (now - threshold))
local total = queued + inflight

-- More than length with an empty queue is what a late heartbeat or a lowered length leaves: there is
-- nothing to trim, so it is plainly full until enough have been released. Nor does a waiter trim that would gain nothing by it:
-- what is free is for pods with a greater length, for which it makes way below.
local surplus = total > length and queued > 0
local others = waits and surplus and inflight >= length
if stale > 0 or total < length or (surplus and not others) then
  return answer({2, math.max(0, length - queued - (inflight - stale)), stale})
end

local function position()
  if waits then
    return redis.call('ZRANK', KEYS[3], token) + 1
  end
  return redis.call('ZCARD', KEYS[3]) + 1
end

local own = position()
if queued > 0 and own > queued then
  -- Those ahead have not come for what is free: they are called once more, and dropped if they are gone.
  call(token)
  own = position()
end
if own <= queued and not others then
  redis.call('LPOP', KEYS[1])
  return take()
end

local full = {0, inflight, redis.call('ZCARD', KEYS[3])}
if waits then
  local arrival = redis.call('ZSCORE', KEYS[3], token)
  local waited = now - math.floor(tonumber(arrival) / 1000000)
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2] or now
  local reachable = send(token, 'can you hear me') and 1 or 0
  full = {0, inflight, full[3], own, arrival, waited, math.max(0, oldest + threshold + 1 - now), reachable}
  if others then
    leave(token) -- until it asks again
    call()
  end
end
return answer(full)
