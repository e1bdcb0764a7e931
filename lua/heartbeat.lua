-- heartbeat keeps the tokens of a pod in use. If they are not in use, the pod was paused
-- and they were reclaimed, or Redis has lost its data. Then heartbeat puts them back, and
-- takes free ones out for them: a pod that runs counts.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] token
-- ARGV[6] pod      "NAME NODE"; empty: not known
-- ARGV[7] held     seconds since the pod took the token
-- ARGV[8] takenAs  the name under which the webhook took the token for this pod; empty:
--                  it took none. If no pod has confirmed that token, it gets the name in
--                  ARGV[5]
-- ARGV[9] tokens   number of tokens that the pod has; missing: 1. A pod with several has no
--                  takenAs
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
local rejoined = use(token, tonumber(ARGV[9]) or 1, now)
if rejoined > 0 then
  grown = true
  takeFree(rejoined)
  count('rejoined', rejoined)
  -- If Redis has lost the last commands, it may have the token in line again.
  if redis.call('ZSCORE', KEYS[3], token) then
    leaveLine(token)
  end
end
notePod(token, ARGV[6], since)
return finish({rejoined > 0 and 0 or 1, micros})
