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
-- ARGV[9] takenAs  the name under which the webhook took the token for this pod; empty:
--                  it took none. If no pod has confirmed that token, it gets the name in
--                  ARGV[6]
-- ARGV[10] unstarted  seconds after which the token is stale if no pod confirms it; empty:
--                  the threshold
--
-- Returns {1, time, agreed}  taken: the token is in use. agreed: the greatest length that
--                            other callers asked for lately, or 0
--         {2, time, stale}   the caller has to repair first: this number of tokens is
--                            stale; if 0, tokens are missing
--         {0, time, tokens in use, waiters, doubt, holders, position, arrival,
--          seconds waited, milliseconds until a token may come free, reachable}
--                            full. doubt: 0, or the seconds until Redis knows if some
--                            holders or waiters are gone. holders: three items for some
--                            tokens in use: the seconds that the pod has had the token,
--                            the pod, and 1 if its sidecar has not started; or -1, the
--                            token, and 0. position and all after it: for a waiter
local length = tonumber(ARGV[5])
local token = ARGV[6]
local arrival = ARGV[7]
local pod = ARGV[8]
local takenAs = ARGV[9] or ''
local unstarted = math.min(tonumber(ARGV[10] or '') or threshold, threshold)
local waits = arrival ~= ''
local held = heldAs(token, takenAs)
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
  redis.call('ZADD', KEYS[2], now - threshold + unstarted, token)
  if lineLength > 0 then
    leaveLine(token)
  end
  if held == takenAs then
    rename(token, takenAs)
  end
  callServed()
  notePod(token, pod, now)
  return finish({1, micros, agreed}, 'busy')
end

if held then
  return take()
end

dropGone()
if waits then
  if lineLength == 0 then
    openLine()
  end
  if not redis.call('ZSCORE', KEYS[3], token) then
    local joined = arrival
    if arrival == '0' then
      -- Behind all others, even if the clock was set back, and behind those to whom a length
      -- is lent.
      local last = tonumber(redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')[2]) or 0
      joined = string.format('%.0f', math.max(micros, last + 1, line.lentTo + 1))
    end
    grown = true
    redis.call('ZADD', KEYS[3], joined, token)
    redis.call('HSET', KEYS[5], token, length)
    notePod(token, pod, 0)
    line.sameReign()
  end
  redis.call('ZADD', KEYS[4], line.seconds, token)
  lineLength = redis.call('ZCARD', KEYS[3])
end

-- limit is the length that counts for the caller. See limitsOf.
local limit, rank = length, 0
if waits then
  rank = redis.call('ZRANK', KEYS[3], token)
  if length < greatest then
    local behind = redis.call('ZRANGE', KEYS[3], rank, rank - rank % 100 + 99)
    limit = line.limitsOf(redis.call('HMGET', KEYS[5], unpack(behind)), rank, length)[1]
  end
end

-- isMine reports whether the waiters ahead leave a free token to the caller. If not, it
-- calls them again.
local function isMine()
  if lineLength == 0 then
    return true
  end
  local free, used, most = line.eachServed(line.call, token, waits and 0 or length)
  return free > 0 and used < most
end

local kept = false -- a token is free, and kept for the waiters ahead
if inflight < limit and redis.call('LLEN', KEYS[1]) > 0 then
  local mine = isMine()
  if lineLength > 0 and not waits then
    line.lend(length)
  end
  if mine then
    redis.call('LPOP', KEYS[1])
    return take()
  end
  kept = true
end

-- Holders that are about to come back may hold the missing tokens. A newcomer cannot tell
-- a semaphore that has lost its data from a new one.
local old = redis.call('ZCOUNT', KEYS[2], '-inf', '(' .. (now - threshold))
local newcomer = arrival == '' or arrival == '0'
local missing = inflight < limit and redis.call('LLEN', KEYS[1]) == 0
local reclaimable = old > 0 and inflight - old < limit
if missing and mayRefill(newcomer) or reclaimable and settled() then
  if waits then
    redis.call('HSET', KEYS[5], token, length) -- whether it is reachable, only a full answer tells
  end
  return finish({2, micros, old})
end

local doubt = 0
if (missing or reclaimable) and not settled() then
  doubt = untilSettled()
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
    local since, name, node = string.match(pods[i] or '', '^(%d+) (%S+) ?(%S*)')
    list[3 * i - 2] = since and math.max(0, now - since) or -1
    list[3 * i - 1] = name or used
    list[3 * i] = node == '' and 1 or 0 -- only a sidecar knows its node
  end
  return list
end

-- untilFree returns the seconds until a token may come free for the waiter: one goes
-- stale, or others ahead are passed. While a token is kept for those, it is short: a longer
-- pause between two commands could hide an outage.
local function untilFree()
  if kept then
    local exact = micros / 1000000
    local oldest = redis.call('ZRANGEBYSCORE', KEYS[4], exact - linePass, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
    return math.max(0.05, math.min(0.8,
      math.max((oldest or 0) + linePass - exact, line.paused / 1000000 + stall - exact)))
  elseif rank >= limit then
    return pollMost
  end
  -- So many have to go first, for the length.
  local over = math.max(0, inflight - limit)
  local oldest = tonumber(redis.call('ZRANGE', KEYS[2], over, over, 'WITHSCORES')[2]) or now
  return math.max(0, oldest + threshold + 1 - now, untilSettled())
end

local full = {0, micros, inflight, redis.call('ZCARD', KEYS[3]), doubt, holders()}
if waits then
  local at = redis.call('ZSCORE', KEYS[3], token)
  full[7] = rank + 1
  full[8] = at
  full[9] = math.max(0, now - math.floor(tonumber(at) / 1000000))
  full[10] = math.ceil(untilFree() * 1000)
  local hears = publish(token, 'can you hear me')
  full[11] = hears and 1 or 0
  local known, text = redis.call('HMGET', KEYS[5], token)[1], (hears and '+' or '') .. length
  if known ~= text then
    redis.call('HSET', KEYS[5], token, text)
    if not hears then
      line.sameReign() -- a restart is a reason
    end
  end
end
return finish(full)
