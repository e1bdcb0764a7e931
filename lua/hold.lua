-- hold keeps many tokens in use at once, for pods whose sidecars do not run yet. Unlike
-- heartbeat it puts no token back: the pod may have given it back meanwhile.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5...] two for each pod: its token, and the number of tokens that it has
--
-- Returns {1, time, lost}  lost: list of the tokens that are not in use
touch(redis.pcall)
-- A full Redis continues a script whose first write needs no memory.
redis.call('EXPIRE', KEYS[2], life(ARGV[4]))
local gone = {}
for i = 5, #ARGV, 2 do
  if redis.call('ZSCORE', KEYS[2], ARGV[i]) then
    takeFree(use(ARGV[i], tonumber(ARGV[i + 1]) or 1, now))
  else
    gone[#gone + 1] = ARGV[i]
  end
end
return finish({1, micros, gone})
