-- hold keeps many tokens in flight at once, for pods that cannot do so yet. Unlike a heartbeat, it puts none back: one that is not there
-- may have been given back by its pod meanwhile.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5...] tokens
--
-- Returns {1, time, lost}  lost: a list of those that are not in flight
touch(redis.pcall)
redis.call('EXPIRE', KEYS[2], ARGV[4]) -- a full Redis lets a script go on that has written what needs no memory
local gone = {}
for i = 5, #ARGV do
  if redis.call('ZSCORE', KEYS[2], ARGV[i]) then
    redis.call('ZADD', KEYS[2], now, ARGV[i])
  else
    gone[#gone + 1] = ARGV[i]
  end
end
return finish({1, micros, gone})
