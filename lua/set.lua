-- set notes the limit of a semaphore, or an override, or moves a waiter to the front of
-- the line. Then it makes the free tokens fit the length, and calls the waiters that may
-- take one. It takes no token from its holder, and no place in line.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] what     "limit", "default" for a limit that counts if Redis knows none,
--                  "override", or "first" to move a waiter
-- ARGV[6] length   empty: none; or the token of the waiter
-- ARGV[7] seconds  the override ends after them; or, with a limit, the keys live for them at
--                  least
-- ARGV[8] note     why, for people
-- ARGV[9] by       who set it, for people
-- ARGV[10] overtake  with a limit: seconds for which lighter waiters may pass the first that
--                  does not fit
--
-- Returns {1, time, tokens in use, waiters}  done
--         {0, time, tokens in use, waiters}  the waiter is not in line

-- Sidecars may run this script, but not this command: a limit is not theirs. If the
-- script fails later, the key has its time to live again.
local left = redis.call('TTL', KEYS[6])
redis.call('PERSIST', KEYS[6])
if left > 0 then
  redis.call('EXPIRE', KEYS[6], left)
end

local last = now + tonumber(ARGV[7])
local what = ARGV[5]
if what == 'default' and (not limit or limit == ARGV[6]) then
  what, last = 'limit', math.max(last, kept)
end
if what == 'limit' then
  limit, kept = ARGV[6], last
elseif what == 'override' then
  override, ends = tonumber(ARGV[6]), ARGV[6] == '' and 0 or last
end
findLengths()
touch()
clampFuture(KEYS[2])
clampFuture(KEYS[4])
if what == 'limit' then
  redis.call('HSET', KEYS[6], 'limit', limit, 'kept', kept, 'overtake', ARGV[10] or 0)
elseif what == 'override' and override then
  redis.call('HSET', KEYS[6], 'override', override, 'ends', ends, 'note', ARGV[8], 'by', ARGV[9])
elseif what == 'override' then
  redis.call('HDEL', KEYS[6], 'override', 'ends', 'note', 'by')
end
local status = 1
if what == 'first' then
  local token, first = ARGV[6], redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
  local place = redis.call('ZSCORE', KEYS[3], token)
  status = place and 1 or 0
  if place and first[1] ~= token then
    local moved = place - first[2] + 1 -- microseconds
    local ahead = math.min(whole(redis.call('HMGET', KEYS[5], token .. '/ahead')[1]) or 0, aheadMost)
    redis.call('ZADD', KEYS[3], string.format('%.0f', place - moved), token)
    redis.call('HSET', KEYS[5], token .. '/ahead', string.format('%.0f', ahead + moved))
    redis.call('HSET', KEYS[6], 'joined', string.format('%.0f', math.max(line.joined, place + ahead)))
  end
end
grown = true
if lineLength > 0 then
  refill(false)
end
trim()
callServed()
return finish({status, micros, redis.call('ZCARD', KEYS[2]), redis.call('ZCARD', KEYS[3])})
