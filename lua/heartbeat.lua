-- heartbeat keeps a token in flight. One that is not there (reclaimed while its pod was paused, or lost with Redis) is put back,
-- and a free one is taken out for it: what runs is counted.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] token
-- ARGV[6] pod    "NAME NODE"; empty: not to be told
-- ARGV[7] held   seconds since the pod has the token
--
-- Returns {0, time}  rejoined: the token was not in flight and is now
--         {1, time}  renewed
local since = now - tonumber(ARGV[7])
if since < created and not redis.call('ZSCORE', KEYS[2], ARGV[5]) then
  tellLoss()
end
touch(redis.pcall)
redis.call('EXPIRE', KEYS[2], ARGV[4]) -- a full Redis lets a script go on that has written what needs no memory
local rejoined = redis.call('ZADD', KEYS[2], now, ARGV[5])
if rejoined == 1 then
  grown = true
  redis.call('LPOP', KEYS[1])
  count('rejoined', 1)
  leave(ARGV[5]) -- it may stand there again if Redis has lost that it was taken
end
tell(ARGV[5], ARGV[6], since)
return finish({1 - rejoined, micros})
