-- acquire takes a free token, under a name that the caller chooses: to ask again with the same name is safe. In the steady state
-- an admission is this script and nothing else.
--
-- A waiter joins the line and keeps its place by asking again. Who does not wait gets only what the line leaves.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] length   how many tokens the semaphore has
-- ARGV[6] token    the name; nobody else ever uses it
-- ARGV[7] arrival  empty: does not wait; "0": joins the line; else as it was answered before
-- ARGV[8] pod      "NAME NODE", or what is known of it; empty: not to be told
--
-- Returns {1, time, agreed}     taken: the token is in flight. agreed: the greatest length that others asked for lately, or 0
--         {2, time, stale}      to be repaired first: tokens are missing, or so many are stale
--         {0, time, tokens in use, waiters, doubt, holders, position, arrival, seconds waited, seconds until one may be stale,
--          reachable}           full. doubt: if not 0, in so many seconds it is known whether some holders or waiters are gone.
--                               holders: of some tokens in use, for how many seconds, and the pod; or -1, and the token.
--                               From position on only for who waits
local length = tonumber(ARGV[5])
local token = ARGV[6]
local arrival = ARGV[7]
local pod = ARGV[8]
local waits = arrival ~= ''
local held = redis.call('ZSCORE', KEYS[2], token)
local agreed = greatest > 0 and now - asked <= 300 and greatest or 0
ask(length)
if waits and arrival ~= '0' and (not state[1] or tonumber(arrival) < created * 1000000) then
  tellLoss()
end
touch(held and redis.pcall)
if held then
  redis.call('EXPIRE', KEYS[2], ARGV[4]) -- a full Redis lets a script go on that has written what needs no memory
end
catchUp(KEYS[2])
if line > 0 then
  catchUp(KEYS[4])
end
local inflight = redis.call('ZCARD', KEYS[2])

local function take()
  grown = grown or inflight == 0
  redis.call('ZADD', KEYS[2], now, token)
  if line > 0 then
    leave(token)
    call()
  end
  tell(token, pod, now)
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
      local last = tonumber(redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')[2]) or 0
      joined = string.format('%.0f', math.max(micros, last + 1)) -- behind all others, wherever the clock was set
    end
    grown = true
    redis.call('ZADD', KEYS[3], joined, token)
    redis.call('HSET', KEYS[5], token, length)
    tell(token, pod, 0)
  end
  redis.call('ZADD', KEYS[4], now, token)
  line = redis.call('ZCARD', KEYS[3])
end

-- ahead is how many are in line before the one that asks.
local function ahead()
  return waits and redis.call('ZRANK', KEYS[3], token) or redis.call('ZCARD', KEYS[3])
end

-- mine reports whether a free token is left for the one that asks when those ahead have theirs.
local function mine()
  if line == 0 then
    return true
  end
  local before = ahead()
  if before > 100 then
    return false
  end
  local free, used = served(function() end, before)
  return free > 0 and used < length
end

if inflight < length and redis.call('LLEN', KEYS[1]) > 0 then
  if mine() then
    redis.call('LPOP', KEYS[1])
    return take()
  end
  call(token) -- those ahead have not come for what is free: once more
end

-- What is missing may be held by those who are about to come back; but a newcomer cannot know a semaphore that has lost its data
-- from a new one.
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
elseif now - resumed <= patience and redis.call('ZCOUNT', KEYS[4], '-inf', '(' .. (now - lineQuiet)) > 0 then
  doubt = resumed + patience + 1 - now
end
-- holders tells of five tokens in use at most, those with the oldest heartbeats.
local function holders()
  local list, fields = {}, {}
  local tokens = redis.call('ZRANGE', KEYS[2], 0, 4)
  for i, held in ipairs(tokens) do
    fields[i] = held .. '/pod'
  end
  local pods = #fields > 0 and redis.call('HMGET', KEYS[5], unpack(fields))
  for i, held in ipairs(tokens) do
    local since, name = string.match(pods[i] or '', '^(%d+) (%S+)')
    list[2 * i - 1] = since and math.max(0, now - since) or -1
    list[2 * i] = name or held
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
  full[11] = send(token, 'can you hear me') and 1 or 0
end
return finish(full)
