-- release gives a token back, or leaves the line. In the end it calls the waiters that
-- may take a free token. To retry it is safe.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] token
--
-- Returns {0, time}  the token was neither in use nor in line
--         {1, time}  released
--         {2, time}  left the line
touch(redis.pcall)
-- This comes first: a full Redis continues a script whose first write needs no memory.
local status = 2 * leaveLine(ARGV[5])
if redis.call('ZREM', KEYS[2], ARGV[5]) == 1 then
  grown = redis.call('RPUSH', KEYS[1], 'free') == 1
  trim()
  status = 1
end
callServed()
return finish({status, micros})
