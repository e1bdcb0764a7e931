-- The common part of all scripts. Redis gets this file, followed by the file of a script.
--
-- KEYS[1] queue     List, one item for each free token. The items have no meaning: a
--                   token gets its name when a pod takes it
-- KEYS[2] inflight  Sorted Set, token in use -> its last heartbeat (Unix seconds)
-- KEYS[3] waiters   Sorted Set, token of a waiter -> its arrival (Unix microseconds)
-- KEYS[4] seen      Sorted Set, token of a waiter -> its last request (Unix seconds)
-- KEYS[5] names     Hash, token of a waiter -> the length that it asks for; and TOKEN/pod
--                   of each token in use or waited for -> "SINCE NAME NODE": when its pod
--                   took it (Unix seconds; 0 of a waiter), the pod's name, and its node
--                   if that is known
-- KEYS[6] state     Hash, times in Unix seconds:
--                     created    when Redis began to know the semaphore
--                     touched    the last command
--                     resumed    the end of the last silence
--                     lost       when a caller reported that Redis has lost its data
--                     length     the greatest length that callers asked for lately
--                     asked      when a caller asked for that length
--                     reclaimed  number of stale tokens taken back so far, for people
--                     rejoined   number of tokens put back by holders so far, for people
-- ARGV[1] deadline      Unix microseconds; the script refuses a command that comes later
-- ARGV[2] interval      seconds between two heartbeats of a holder
-- ARGV[3] threshold     seconds without a heartbeat after which a token is stale
-- ARGV[4] time to live  seconds, of all keys while there are holders or waiters
--
-- All times are by this server's clock. An administrator may set it, and a failover
-- replaces it by the clock of another server.
--
-- Each script returns a list. The first item is its status, the second the time in Unix
-- microseconds. All items are integers but the arrival of a waiter, a string. Status -1
-- refuses a command that came after its deadline: the script did nothing.

local time = redis.call('TIME')
local now = tonumber(time[1])
local micros = now * 1000000 + tonumber(time[2])

-- The caller has given this command up, and may rely on it having no effect.
if micros > tonumber(ARGV[1]) then
  return {-1, micros}
end

-- These values have to agree with the program, where they have the same names. The test
-- TestScriptsAndProgramAgree compares them.
local beatTimeout = 3 -- seconds; when Redis answers again, live holders beat within this time
local pollMost = 4 -- seconds; the longest time between two requests of a live waiter
local lineQuiet = 5 -- seconds; with live waiters in line, commands come more often
local yourTurn = 'your turn' -- the message to a waiter that may take a free token

-- If there is a live holder, a heartbeat comes at least this often.
local interval = tonumber(ARGV[2])
local quiet = interval + math.min(beatTimeout, interval)

-- Redis does not notice a silence up to quiet. A live holder may miss a heartbeat at its
-- start, and must not be stale at its end.
local threshold = math.max(tonumber(ARGV[3]), 2 * quiet)

-- Without a request for this time, a waiter is gone. A live one asks within pollMost.
-- Then Redis may be away for lineQuiet unnoticed, and the waiter asks again within
-- pollMost. One more second is for fractions of seconds.
local linePatience = pollMost + lineQuiet + pollMost + 1

local lengthMemory = 300 -- seconds; the scripts forget an older greatest length
local idleLife = 300 -- seconds; the time to live without holders and waiters

local state = redis.call('HMGET', KEYS[6], 'created', 'touched', 'resumed', 'lost', 'length', 'asked')
-- A time in the future is from before the clock was set back.
local created, touched = math.min(tonumber(state[1]) or now, now), tonumber(state[2])
local resumed, lost = math.min(tonumber(state[3]) or 0, now), math.min(tonumber(state[4]) or 0, now)
local greatest, asked = tonumber(state[5]) or 0, tonumber(state[6]) or 0
local lineLength = redis.call('ZCARD', KEYS[3])

-- touch notes a command. After a silence that live holders or waiters would have ended,
-- Redis was away, or its clock was set. Then no holder is stale, and no waiter gone,
-- before it had the time to come back.
--
-- A full Redis refuses waiters: for them it is away. A command that has to work all the
-- same passes redis.pcall as write. touch then notes nothing, and the script continues.
local function touch(write)
  local silence = lineLength > 0 and lineQuiet or quiet
  if touched and (now - touched > silence or touched > now) or not touched and redis.call('EXISTS', KEYS[2]) == 1 then
    resumed = now
  elseif touched and now - touched > math.max(interval, lineQuiet) and touched - resumed <= quiet then
    -- A second silence soon after the first: a holder that was not back before it gets
    -- the time now.
    resumed = math.max(resumed, now - interval)
  end
  write = write or redis.call
  write('HSET', KEYS[6], 'created', created, 'touched', now, 'resumed', resumed, 'lost', lost,
    'length', greatest, 'asked', asked)
end

-- noteLoss is for a caller that is older than the data in Redis. Callers that could not
-- know the number of holders made the free tokens. A repair makes them anew when the
-- holders are back.
local function noteLoss()
  if lost < created then -- the first report of this loss
    lost = now
    redis.call('DEL', KEYS[1])
  end
end

-- noteLength notes the length that a caller asks for; touch writes it.
local function noteLength(length)
  if length >= greatest or now - asked > lengthMemory or asked > now then
    greatest, asked = length, now
  end
end

-- settled reports whether holders have had the time to come back, since the last silence
-- and since a loss of data.
local function settled()
  return now - math.max(resumed, lost) > quiet
end

-- mayRefill reports whether a repair may replace missing tokens: uncounted holders have
-- had the time to come back. A newcomer was not in line before, and cannot know of a
-- silence. It waits only after another caller has reported a loss.
local function mayRefill(newcomer)
  return settled() or newcomer and now - lost > quiet
end

-- clampFuture sets scores in the future, from before the clock was set back, to now: at
-- most 300 of them.
local function clampFuture(key)
  local newest = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')[2]
  if newest and tonumber(newest) > now then
    for _, token in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. now, '+inf', 'LIMIT', 0, 300)) do
      redis.call('ZADD', key, now, token)
    end
  end
end

-- leaveLine takes a token out of the line, and forgets its pod.
local function leaveLine(token)
  redis.call('ZREM', KEYS[4], token)
  redis.call('HDEL', KEYS[5], token, token .. '/pod')
  return redis.call('ZREM', KEYS[3], token)
end

local grown = false -- this command may have created a key; see finish

-- notePod notes the pod of a token, "NAME NODE", and since when the pod has the token,
-- unless Redis knows that. Without a pod it notes nothing.
local function notePod(token, pod, since)
  if pod == '' then
    return
  end
  local known = redis.call('HMGET', KEYS[5], token .. '/pod')[1]
  local at = known and tonumber(string.match(known, '^%d+')) or 0
  local text = string.format('%.0f %s', at > 0 and at or since, pod)
  if text ~= known then
    grown = grown or redis.call('EXISTS', KEYS[5]) == 0
    redis.pcall('HSET', KEYS[5], token .. '/pod', text) -- a full Redis does without
  end
end

-- dropGone takes waiters that are gone out of the line, at most 100: they must block no
-- other.
local function dropGone()
  if lineLength > 0 and now - resumed > linePatience then
    local before = '(' .. (now - linePatience)
    for _, token in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', before, 'LIMIT', 0, 100)) do
      leaveLine(token)
    end
  end
end

-- publish reports whether a waiter received a message. It returns false if the ACL
-- forbids PUBLISH.
local function publish(token, message)
  local listeners = redis.pcall('PUBLISH', KEYS[3] .. '/' .. token, message)
  return type(listeners) == 'number' and listeners > 0
end

-- eachServed goes along the line, up to 100 waiters, and gives each its free token. A
-- waiter whose length is used up does not block those behind it. eachServed calls visit
-- for each waiter that gets a token. It returns the number of free tokens left, and the
-- number that is in use then.
local function eachServed(visit, most)
  local free, used = redis.call('LLEN', KEYS[1]), redis.call('ZCARD', KEYS[2])
  if free == 0 or most == 0 then
    return free, used
  end
  local tokens = redis.call('ZRANGE', KEYS[3], 0, math.min(most, 100) - 1)
  if #tokens == 0 then
    return free, used
  end
  local lengths = redis.call('HMGET', KEYS[5], unpack(tokens))
  for i, token in ipairs(tokens) do
    if used < (tonumber(lengths[i]) or math.huge) then
      visit(token)
      free, used = free - 1, used + 1
      if free == 0 then
        break
      end
    end
  end
  return free, used
end

-- callServed wakes the waiters that may take a free token, at most 16: each of them calls
-- the next when it takes its token. asking is the caller's own token, which needs no
-- call.
local function callServed(asking)
  if lineLength == 0 then
    return
  end
  dropGone()
  local calls = 0
  eachServed(function(token)
    calls = calls + 1
    if token ~= asking and calls <= 16 then
      publish(token, yourTurn)
    end
  end, 100)
end

-- trim takes free tokens beyond the greatest length out of the queue. After a loss of
-- data Redis does not know that length: then trim takes all, and the next request makes
-- new ones.
local function trim()
  local room = math.max(0, greatest - redis.call('ZCARD', KEYS[2]))
  local surplus = redis.call('LLEN', KEYS[1]) - room
  if surplus <= 0 then
    return 0
  end
  if room == 0 then
    redis.call('DEL', KEYS[1]) -- LTRIM 0 -1 would keep all
  else
    redis.call('LTRIM', KEYS[1], 0, room - 1)
  end
  return surplus
end

-- count adds to a number of state that people read.
local function count(field, n)
  local before = redis.call('HMGET', KEYS[6], field)[1]
  redis.pcall('HSET', KEYS[6], field, string.format('%.0f', (tonumber(before) or 0) + n)) -- a full Redis does without
end

-- finish sets the time to live of the keys: minutes if there are neither holders nor
-- waiters. All keys have the time to live of state, unless this command may have created
-- one (grown). busy says that there are holders or waiters.
local function finish(answer, busy)
  -- One key at a time: in a Cluster, a script may name only one key of a slot that moves.
  busy = busy or redis.call('EXISTS', KEYS[2]) + redis.call('EXISTS', KEYS[3]) > 0
  local seconds = busy and tonumber(ARGV[4]) or idleLife
  local left = redis.call('TTL', KEYS[6])
  if grown or left < seconds / 2 or left > seconds then
    for _, key in ipairs(KEYS) do
      redis.call('EXPIRE', key, seconds)
    end
  end
  return answer
end
