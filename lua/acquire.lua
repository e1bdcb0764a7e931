-- acquire takes a free token, under a name that the caller chooses: to ask again with the
-- same name is safe. In the steady state an admission runs this script and no other.
--
-- A waiter joins the line, and keeps its place by asking again. A caller that does not
-- wait gets only the tokens that the line leaves.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] length   number of tokens of the semaphore
-- ARGV[6] token    the name; no other caller ever uses it
-- ARGV[7] arrival  empty: does not wait; "0": joins the line; else as the script returned
--                  it before
-- ARGV[8] pod      "NAME NODE", or the part that is known; empty: not known
--
-- Returns {1, time, agreed}  taken: the token is in use. agreed: the greatest length that
--                            other callers asked for lately, or 0
--         {2, time, stale}   the caller has to repair first: this number of tokens is
--                            stale; if 0, tokens are missing
--         {0, time, tokens in use, waiters, doubt, holders, position, arrival,
--          seconds waited, seconds until a token may be stale, reachable}
--                            full. doubt: 0, or the seconds until Redis knows if some
--                            holders or waiters are gone. holders: of some tokens in use,
--                            the seconds that the pod has had the token, and the pod; or
--                            -1 and the token. position and all after it: for a waiter
local length = tonumber(ARGV[5])
local token = ARGV[6]
local arrival = ARGV[7]
local pod = ARGV[8]
local waits = arrival ~= ''
local held = redis.call('ZSCORE', KEYS[2], token)
local agreed = greatest > 0 and now - asked <= lengthMemory and greatest or 0
noteLength(length)
if waits and arrival ~= '0' and (not state[1] or tonumber(arrival) < created * 1000000) then
  noteLoss()
end
touch(held and redis.pcall)
if held then
  -- A full Redis continues a script whose first write needs no memory.
  redis.call('EXPIRE', KEYS[2], ARGV[4])
end
clampFuture(KEYS[2])
if lineLength > 0 then
  clampFuture(KEYS[4])
end
local inflight = redis.call('ZCARD', KEYS[2])

local function take()
  grown = grown or inflight == 0
  redis.call('ZADD', KEYS[2], now, token)
  if lineLength > 0 then
    leaveLine(token)
    callServed()
  end
  notePod(token, pod, now)
  return finish({1, micros, agreed}, 'busy')
end

if held then
  return take()
end

dropGone()
if waits then
  if not redis.call('ZSCORE', KEYS[3], token) then
    local joined = arrival
    if arrival == '0' then
      -- Behind all others, even if the clock was set back.
      local last = tonumber(redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')[2]) or 0
      joined = string.format('%.0f', math.max(micros, last + 1))
    end
    grown = true
    redis.call('ZADD', KEYS[3], joined, token)
    redis.call('HSET', KEYS[5], token, length)
    notePod(token, pod, 0)
  end
  redis.call('ZADD', KEYS[4], now, token)
  lineLength = redis.call('ZCARD', KEYS[3])
end

-- ahead returns the number of waiters in line before the caller.
local function ahead()
  return waits and redis.call('ZRANK', KEYS[3], token) or redis.call('ZCARD', KEYS[3])
end

-- isMine reports whether the waiters ahead leave a free token to the caller.
local function isMine()
  if lineLength == 0 then
    return true
  end
  local before = ahead()
  if before > 100 then
    return false
  end
  local free, used = eachServed(function() end, before)
  return free > 0 and used < length
end

if inflight < length and redis.call('LLEN', KEYS[1]) > 0 then
  if isMine() then
    redis.call('LPOP', KEYS[1])
    return take()
  end
  callServed(token) -- the waiters ahead have not come for the free tokens: call them again
end

-- Holders that are about to come back may hold the missing tokens. A newcomer cannot tell
-- a semaphore that has lost its data from a new one.
local old = redis.call('ZCOUNT', KEYS[2], '-inf', '(' .. (now - threshold))
local newcomer = arrival == '' or arrival == '0'
local missing = inflight < length and redis.call('LLEN', KEYS[1]) == 0
local reclaimable = old > 0 and inflight - old < length
if missing and mayRefill(newcomer) or reclaimable and settled() then
  return finish({2, micros, old})
end

local doubt = 0
if (missing or reclaimable) and not settled() then
  doubt = math.max(resumed, lost) + quiet + 1 - now
elseif now - resumed <= linePatience and redis.call('ZCOUNT', KEYS[4], '-inf', '(' .. (now - lineQuiet)) > 0 then
  doubt = resumed + linePatience + 1 - now
end

-- holders returns the holders of the five tokens with the oldest heartbeats.
local function holders()
  local list, fields = {}, {}
  local tokens = redis.call('ZRANGE', KEYS[2], 0, 4)
  for i, used in ipairs(tokens) do
    fields[i] = used .. '/pod'
  end
  local pods = #fields > 0 and redis.call('HMGET', KEYS[5], unpack(fields))
  for i, used in ipairs(tokens) do
    local since, name = string.match(pods[i] or '', '^(%d+) (%S+)')
    list[2 * i - 1] = since and math.max(0, now - since) or -1
    list[2 * i] = name or used
  end
  return list
end

local full = {0, micros, inflight, redis.call('ZCARD', KEYS[3]), doubt, holders()}
if waits then
  local at = redis.call('ZSCORE', KEYS[3], token)
  local oldest = tonumber(redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]) or now
  full[7] = ahead() + 1
  full[8] = at
  full[9] = math.max(0, now - math.floor(tonumber(at) / 1000000))
  full[10] = math.max(0, oldest + threshold + 1 - now, math.max(resumed, lost) + quiet + 1 - now)
  full[11] = publish(token, 'can you hear me') and 1 or 0
end
return finish(full)
