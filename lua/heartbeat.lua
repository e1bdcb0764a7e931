-- heartbeat keeps a token in flight. One that is not there (reclaimed while its pod was paused, or lost
-- with Redis) is put back, and a free one is taken out for it: what runs is counted.
--
-- KEYS[1] queue     List of the free tokens
-- KEYS[2] inflight  Sorted Set, token -> time of the last heartbeat (Unix seconds, this server's clock)
-- ARGV[1] token
-- ARGV[2] time to live     seconds, of both keys, renewed by any use
--
-- Returns 0  rejoined: the token was not in flight and is now
--         1  renewed
local now = redis.call('TIME')[1]
local rejoined = redis.call('ZADD', KEYS[2], now, ARGV[1])
if rejoined == 1 then
  redis.call('LPOP', KEYS[1])
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1 - rejoined
