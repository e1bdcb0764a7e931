-- heartbeat keeps a token in use. If the token is not in use, its pod was paused and the
-- token reclaimed, or Redis has lost its data. Then heartbeat puts the token back, and
-- takes a free one out for it: a pod that runs counts.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] token
-- ARGV[6] pod      "NAME NODE"; empty: not known
-- ARGV[7] held     seconds since the pod took the token
-- ARGV[8] takenAs  the name under which the webhook took the token for this pod; empty:
--                  it took none. If no pod has confirmed that token, it gets the name in
--                  ARGV[5]
--
-- Returns {0, time}  rejoined: the token was not in use, and is now
--         {1, time}  renewed
local token = ARGV[5]
local takenAs = ARGV[8] or ''
local since = now - tonumber(ARGV[7])
local held = heldAs(token, takenAs)
if not held then
  -- A reclaim or a release forgets the pod. If Redis knows since when the pod has the
  -- token, it has lost inflight alone: it has evicted that key.
  local pod = redis.call('HMGET', KEYS[5], token .. '/pod')[1]
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
redis.call('EXPIRE', KEYS[2], life(ARGV[4]))
if held == takenAs then
  rename(token, takenAs)
end
local rejoined = redis.call('ZADD', KEYS[2], now, token)
if rejoined == 1 then
  grown = true
  redis.call('LPOP', KEYS[1])
  count('rejoined', 1)
  -- If Redis has lost the last commands, it may have the token in line again.
  leaveLine(token)
end
notePod(token, ARGV[6], since)
return finish({1 - rejoined, micros})
