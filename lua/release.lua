-- release gives a token back, or leaves the line of those who wait for one. The capacity returns to the queue under a fresh
-- name, so that nothing that still knows the old one can touch it there or with its next owner. Those first in line are called
-- for what is free then. Safe to retry.
--
-- KEYS    see line.lua
-- ARGV[1] token
-- ARGV[2] fresh token
-- ARGV[3] time to live     seconds, of all keys, renewed by any use
--
-- Returns 0  the token was not in flight and not waited for; nothing was changed
--         1  released
--         2  left the line
local answer = 2 * leave(ARGV[1])
if redis.call('ZREM', KEYS[2], ARGV[1]) == 1 then
  redis.call('RPUSH', KEYS[1], ARGV[2])
  answer = 1
end
call()
renew(ARGV[3])
return answer
