-- release gives the tokens of a pod back, or leaves the line. In the end it calls the
-- waiters that may take a free token. To retry it is safe.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] token
-- ARGV[6] takenAs  the name under which the webhook took the token for this pod; empty:
--                  it took none. It is given back if the pod has nothing under the name
--                  in ARGV[5], and if no pod has confirmed it
-- ARGV[7] byHand   "byHand": a person does it; for the history
--
-- Returns {0, time}  the token was neither in use nor in line
--         {1, time}  released
--         {2, time}  left the line, or forgotten that it had given up
local token = ARGV[5]
local takenAs = ARGV[6] or ''
local byHand = ARGV[7] == 'byHand' and 'byHand'
local pods = redis.call('HMGET', KEYS[5], token .. '/pod', takenAs .. '/pod')
addHold(pods[1] or pods[2])
touch(redis.pcall)
-- This comes first: a full Redis continues a script whose first write needs no memory.
local status = 2 * leaveLine(token, byHand or 'left')
local released = redis.call('ZREM', KEYS[2], token)
if released + status == 0 and takenAs ~= '' then
  redis.call('HDEL', KEYS[5], takenAs .. '/pod')
  released = redis.call('ZREM', KEYS[2], takenAs)
end
local gaveUp = released == 0 and redis.call('HMGET', KEYS[5], token .. '/gaveUp')[1]
if gaveUp then
  redis.call('HDEL', KEYS[5], token .. '/gaveUp', string.match(gaveUp, '%S*$'))
  status = 2
end
local used = 0 -- tokens
if released == 1 then
  local free = redis.call('RPUSH', KEYS[1], 'free')
  grown = free == 1
  while released < tokensMost and redis.call('ZREM', KEYS[2], token .. '/' .. released + 1) == 1 do
    free = redis.call('RPUSH', KEYS[1], 'free')
    released = released + 1
  end
  noteEnd(byHand or 'released', pods[1] or pods[2], released)
  used = redis.call('ZCARD', KEYS[2])
  trim(free, used)
  status = 1
end
callServed()
return finish({status, micros}, used > 0)
