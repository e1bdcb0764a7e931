-- heartbeat keeps a token in use. If the token is not in use, its pod was paused and the
-- token reclaimed, or Redis has lost its data. Then heartbeat puts the token back, and
-- takes a free one out for it: a pod that runs counts.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] token
-- ARGV[6] pod    "NAME NODE"; empty: not known
-- ARGV[7] held   seconds since the pod took the token
--
-- Returns {0, time}  rejoined: the token was not in use, and is now
--         {1, time}  renewed
local since = now - tonumber(ARGV[7])
if not redis.call('ZSCORE', KEYS[2], ARGV[5]) then
  -- A reclaim or a release forgets the pod. If Redis knows since when the pod has the
  -- token, it has lost inflight alone: it has evicted that key.
  local pod = redis.call('HMGET', KEYS[5], ARGV[5] .. '/pod')[1]
  local taken = pod and tonumber(string.match(pod, '^%d+')) or 0
  local evicted = taken >= created and taken > lost
  if evicted then
    created = now
  end
  if evicted or since < created then
    noteLoss()
  end
end
touch(redis.pcall)
-- A full Redis continues a script whose first write needs no memory.
redis.call('EXPIRE', KEYS[2], ARGV[4])
local rejoined = redis.call('ZADD', KEYS[2], now, ARGV[5])
if rejoined == 1 then
  grown = true
  redis.call('LPOP', KEYS[1])
  count('rejoined', 1)
  -- If Redis has lost the last commands, it may have the token in line again.
  leaveLine(ARGV[5])
end
notePod(ARGV[5], ARGV[6], since)
return finish({1 - rejoined, micros})
