-- acquire takes a free token, under a name that the caller chooses: to ask again with the
-- same name is safe. In the steady state an admission runs this script and no other. A pod
-- that needs several gets all of them at once, or none.
--
-- A waiter joins the line, and keeps its place by asking again. A caller that does not
-- wait gets only the tokens that the line leaves.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] length   number of tokens of the semaphore; or LENGTH*TOKENS for a pod that needs
--                  several, which has no takenAs
-- ARGV[6] token    the name; no other caller ever uses it
-- ARGV[7] arrival  empty: does not wait; "0": joins the line; else as the script returned
--                  it before
-- ARGV[8] pod      "NAME NODE", or the part that is known; empty: not known
-- ARGV[9] takenAs  the name under which the webhook took the token for this pod; empty:
--                  it took none. If no pod has confirmed that token, it gets the name in
--                  ARGV[6]
-- ARGV[10] unstarted  seconds after which the token is stale if no pod confirms it; empty:
--                  the threshold
-- ARGV[11] limit   the limit that the caller knows; empty: none. It counts if Redis knows
--                  nothing of one: it may have lost its data
-- ARGV[12] ahead   microseconds that a waiter's place is before its arrival: its head start
--                  when it joins the line, or else as the script returned it before; empty:
--                  none
-- ARGV[13] wait    seconds after its arrival at which a waiter gives up; empty: never
-- ARGV[14] run     "run": it does not give up then, but takes a token beyond the length
--
-- Returns {1, time, agreed, beyond}  taken: the token is in use. agreed: the greatest length
--                            that other callers asked for lately, or 0. beyond: 1 if this
--                            command took it beyond the length, as its wait was over
--         {2, time, stale, newcomer}   the caller has to repair first: this number of
--                            tokens is stale; if 0, tokens are missing. newcomer: see
--                            maintain.lua
--         {0, time, occupancy (seven items, see semaphore.lua), position, arrival, seconds waited,
--          milliseconds until a token may come free, reachable, ahead}
--                            full. position and all after it: for a waiter
--         {3, ... as with 0} gave up: the waiter is out of the line. It gets the same answer
--                            again until it releases its token
local wish = ARGV[5]
local asksFor, needs = wishOf(wish)
local token = ARGV[6]
local arrival = ARGV[7]
local pod = ARGV[8]
local takenAs = ARGV[9] or ''
local unstarted = math.min(tonumber(ARGV[10] or '') or threshold, threshold)
local waits = arrival ~= ''
local wait, runs = tonumber(ARGV[13] or ''), ARGV[14] == 'run'
local held = heldAs(token, takenAs)
local agreed = not set and asks > 0 and now - asked <= lengthMemory and asks or 0
noteLength(asksFor)
if not limit and (ARGV[11] or '') ~= '' then
  limit = ARGV[11]
  findLengths()
end
local length = set or asksFor -- counts for the caller, whatever its place
if waits and arrival ~= '0' and (not state[1] or tonumber(arrival) < created * 1000000) then
  noteLoss()
end
touch(held and redis.pcall)
if limit and not state[10] then
  redis.pcall('HSET', KEYS[6], 'limit', limit)
end
if held then
  -- A full Redis continues a script whose first write needs no memory.
  redis.call('EXPIRE', KEYS[2], life(ARGV[4]))
end
clampFuture(KEYS[2])
if lineLength > 0 then
  clampFuture(KEYS[4])
end
local inflight = redis.call('ZCARD', KEYS[2])

local function take(beyond)
  grown = grown or inflight == 0
  use(token, needs, now - threshold + unstarted)
  local waited
  if lineLength > 0 then
    waited = waitedFor(token, redis.call('HMGET', KEYS[5], token .. '/ahead')[1])
    if waited then
      leaveLine(token)
    end
  end
  if held == takenAs then
    rename(token, takenAs)
  end
  callServed()
  notePod(token, pod, now, waited)
  return finish({1, micros, agreed, beyond or 0}, 'busy')
end

if held then
  return take()
end

-- giveUp takes the waiter out of the line. waited is how long it has waited, in seconds.
local function giveUp(waited)
  leaveLine(token, 'gaveUp')
  callServed()
  local gone = {3, micros, occupancy(length, 0)}
  for i, item in ipairs({0, arrival, waited, 0, 0, 0}) do
    gone[9 + i] = item
  end
  return finish(gone)
end

if wait then
  local before = redis.call('HMGET', KEYS[5], token .. '/gaveUp')[1]
  if before then
    return giveUp(tonumber(string.match(before, '^%d+')) or 0)
  end
end

dropGone(waits and token)
if waits then
  if lineLength == 0 then
    openLine()
  end
  if not redis.call('ZSCORE', KEYS[3], token) then
    local joined, ahead = tonumber(arrival), tonumber(ARGV[12] or '') or 0
    if arrival == '0' then
      -- Behind all others, even if the clock was set back, and behind those to whom a length
      -- is lent.
      local last = tonumber(redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')[2]) or 0
      joined = math.max(micros, last + 1, line.lentTo + 1, lineLength > 0 and line.joined + 1 or 0)
      if ahead > 0 then
        line.comesAfterLoan(joined - ahead)
      end
    end
    grown = true
    redis.call('ZADD', KEYS[3], string.format('%.0f', joined - ahead), token)
    redis.call('HSET', KEYS[5], token, wish)
    if ahead > 0 then
      redis.call('HSET', KEYS[5], token .. '/ahead', ahead)
      redis.call('HSET', KEYS[6], 'joined', string.format('%.0f', math.max(joined, lineLength > 0 and line.joined or 0)))
    end
    local known = wait and pod ~= '' and string.format('%s %.0f%s', pod, wait, runs and ' run' or '') or pod
    notePod(token, known, 0)
    line.sameReign()
  end
  redis.call('ZADD', KEYS[4], line.seconds, token)
  lineLength = redis.call('ZCARD', KEYS[3])
end

-- most is the length that counts for the caller at its place. See limitsOf.
local most, rank = length, 0
if waits then
  rank = redis.call('ZRANK', KEYS[3], token)
  if length < greatest then
    local behind = redis.call('ZRANGE', KEYS[3], rank, rank - rank % 100 + 99)
    most = line.limitsOf(redis.call('HMGET', KEYS[5], unpack(behind)), rank, length)[1]
  end
end

-- isMine reports whether the waiters ahead leave enough free tokens to the caller. If not,
-- it calls them again. kept is true if one of them needs more than is free: Redis keeps the
-- free tokens for it.
local function isMine()
  if lineLength == 0 then
    return true
  end
  local free, used, here, kept = line.eachServed(line.call, token, waits and 0 or length)
  return free >= needs and used + needs <= here, kept
end

local reserved = false -- enough is free, and the waiters ahead are about to take it
if inflight + needs <= most and redis.call('LLEN', KEYS[1]) >= needs then
  local mine, kept = isMine()
  if lineLength > 0 and not waits then
    line.lend(asksFor)
  end
  if mine then
    takeFree(needs)
    return take()
  end
  reserved = not kept or rank < 3 -- the next in line notice if they are dead
elseif waits and rank == 0 and needs > 1 and needs <= most then
  line.letsPass(token) -- its time as the first begins
end

-- Holders that are about to come back may hold the missing tokens. A newcomer cannot tell
-- a semaphore that has lost its data from a new one, nor can a waiter that has come since
-- the last silence.
local old = redis.call('ZCOUNT', KEYS[2], '-inf', '(' .. (now - threshold))
local newcomer = not waits or arrival == '0' or tonumber(arrival) >= resumed * 1000000
-- A caller that does not wait is refused now: then it is not enough that a token is free
-- for those in line.
local free = redis.call('LLEN', KEYS[1])
local missing = inflight + needs <= most
  and (free < needs or not waits and free < math.min(portion, most - inflight))
local reclaimable = old > 0 and inflight - old + needs <= most
if missing and mayRefill(newcomer) or reclaimable and settled() then
  if waits then
    redis.call('HSET', KEYS[5], token, wish) -- whether it is reachable, only a full answer tells
  end
  return finish({2, micros, old, newcomer and 1 or 0})
end

local doubt = 0
if (missing or reclaimable) and not settled() then
  doubt = untilSettled()
elseif now - resumed <= linePatience and redis.call('ZCOUNT', KEYS[4], '-inf', '(' .. (now - lineQuiet)) > 0 then
  doubt = resumed + linePatience + 1 - now
end

-- untilFree returns the seconds until a token may come free for the waiter: one goes
-- stale, or others ahead are passed. While a token is kept for those, it is short: a longer
-- pause between two commands could hide an outage.
local function untilFree()
  if reserved then
    local exact = micros / 1000000
    local oldest = redis.call('ZRANGEBYSCORE', KEYS[4], exact - linePass, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
    return math.max(0.05, math.min(0.8,
      math.max((oldest or 0) + linePass - exact, line.paused / 1000000 + stall - exact)))
  elseif rank >= most then
    return pollMost
  end
  -- So many have to go first, for the length.
  local over = math.max(0, inflight + needs - 1 - most)
  local oldest = tonumber(redis.call('ZRANGE', KEYS[2], over, over, 'WITHSCORES')[2]) or now
  return math.max(0, oldest + threshold + 1 - now, untilSettled())
end

local known = waits and redis.call('HMGET', KEYS[5], token, token .. '/ahead')
local ahead = known and math.min(whole(known[2]) or 0, aheadMost)
local at = waits and redis.call('ZSCORE', KEYS[3], token) + ahead
local givesUp = wait and at and at / 1000000 + wait
-- While holders may come back, Redis does not know how many tokens are in use.
if givesUp and givesUp <= micros / 1000000 and settled() then
  if runs then
    takeFree(needs) -- a pod that runs counts
    count('ranBeyond', 1)
    return take(1)
  end
  local waited = now - math.floor(at / 1000000)
  noteGaveUp(token, waited)
  return giveUp(waited)
end

local full = {0, micros, occupancy(most, doubt)}
if waits then
  full[10] = rank + 1
  full[11] = string.format('%.0f', at)
  full[12] = math.max(0, now - math.floor(at / 1000000))
  local pause = untilFree()
  if rank < 3 and ends > now then -- the first may be dead
    pause = math.min(pause, ends - micros / 1000000) -- then another length counts
  end
  if givesUp then
    pause = math.min(pause, math.max(givesUp - micros / 1000000, settled() and 0 or untilSettled()))
  end
  full[13] = math.ceil(pause * 1000)
  local hears = publish(token, 'can you hear me')
  full[14] = hears and 1 or 0
  full[15] = string.format('%.0f', ahead)
  local text = (hears and '+' or '') .. wish
  if known[1] ~= text then
    redis.call('HSET', KEYS[5], token, text)
    if not hears then
      line.sameReign() -- a restart is a reason
    end
  end
end
return finish(full)
