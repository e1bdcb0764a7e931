-- release gives a token back, or leaves the line. Those first in line are called for what is free then. Safe to retry.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] token
--
-- Returns {0, time}  the token was not in flight and not waited for
--         {1, time}  released
--         {2, time}  left the line
touch(redis.pcall)
local status = 2 * leave(ARGV[5]) -- before all else: a full Redis lets a script go on that has written what needs no memory
if redis.call('ZREM', KEYS[2], ARGV[5]) == 1 then
  grown = redis.call('RPUSH', KEYS[1], 'free') == 1
  trim()
  status = 1
end
call()
return finish({status, micros})
