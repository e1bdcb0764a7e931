-- release gives a token back. The capacity returns to the queue under a fresh name, so that nothing that
-- still knows the old one can touch it there or with its next owner. Safe to retry.
--
-- KEYS[1] queue     List of the free tokens
-- KEYS[2] inflight  Sorted Set, token -> time of the last heartbeat (Unix seconds, this server's clock)
-- ARGV[1] token
-- ARGV[2] fresh token
-- ARGV[3] time to live     seconds, of both keys, renewed by any use
--
-- Returns 0  the token was not in flight; nothing was changed
--         1  released
local released = redis.call('ZREM', KEYS[2], ARGV[1])
if released == 1 then
  redis.call('RPUSH', KEYS[1], ARGV[2])
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return released
