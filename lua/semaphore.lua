-- What all scripts share; it is put before each of them.
--
-- KEYS[1] queue     List, one item for each free token. The items have no meaning: a token gets its name when it is taken
-- KEYS[2] inflight  Sorted Set, token in use -> its last heartbeat (Unix seconds)
-- KEYS[3] waiters   Sorted Set, token that a waiter asks for -> when it joined the line (Unix microseconds)
-- KEYS[4] seen      Sorted Set, the same tokens -> when the waiter asked last (Unix seconds)
-- KEYS[5] names     Hash, the same tokens -> the waiter's length; and of tokens in use or waited for, token/pod -> since when it is
--                   in use (Unix seconds; 0 of a waiter), the pod's name, and its node where that is known
-- KEYS[6] state     Hash, all times in Unix seconds: created; touched, when the last command came; resumed, when the last silence
--                   ended; lost, when it was seen that Redis has lost its data; length, the greatest that was asked for lately,
--                   and asked, when. Beside them, for people: how many tokens were reclaimed, and rejoined, so far
-- ARGV[1] deadline      Unix microseconds: a command that comes later is refused
-- ARGV[2] interval      seconds between two heartbeats of a holder
-- ARGV[3] threshold     seconds without a heartbeat after which a token is stale
-- ARGV[4] time to live  seconds, of all keys while there are holders or waiters
--
-- All times are by this server's clock, and it may be set, or another server take over with another clock.
--
-- Each script returns a list of integers, but for waiters' arrivals, which are strings; the first is its status, the second the
-- time in Unix microseconds. Status -1 is for a command that came after its deadline: nothing was done.

local time = redis.call('TIME')
local now = tonumber(time[1])
local micros = now * 1000000 + tonumber(time[2])

-- Nobody waits for the answer any more, and what the caller did since may rely on this command having no effect.
if micros > tonumber(ARGV[1]) then
  return {-1, micros}
end

-- Once Redis answers again after a silence, live holders are back within this time; see attemptTimeout and holderRetry.
local interval = tonumber(ARGV[2])
local back = math.min(3, interval)

-- Some holder's heartbeat comes at least that often, if there is one; and while waiters live, some command comes more often.
local quiet = interval + back
local lineQuiet = 5

-- A live holder that just missed a heartbeat when a silence of no more than quiet began is not stale when it ends.
local threshold = math.max(tonumber(ARGV[3]), 2 * quiet)

-- A waiter that has not asked for patience is gone. A live one asks within 4 s of its last question; a silence of lineQuiet may
-- come between and not be noticed, and 4 s after it the waiter has asked again. One more is for fractions of seconds.
local patience = 4 + lineQuiet + 4 + 1

local state = redis.call('HMGET', KEYS[6], 'created', 'touched', 'resumed', 'lost', 'length', 'asked')
-- Times that lie in the future are from before the clock was set back.
local created, touched = math.min(tonumber(state[1]) or now, now), tonumber(state[2])
local resumed, lost = math.min(tonumber(state[3]) or 0, now), math.min(tonumber(state[4]) or 0, now)
local greatest, asked = tonumber(state[5]) or 0, tonumber(state[6]) or 0
local line = redis.call('ZCARD', KEYS[3]) -- how many wait

-- touch notes that a command has come. After a silence that live holders or waiters would not have let pass, Redis was away, or
-- its clock was set: then nobody is stale or gone before they had the time to come back.
--
-- A full Redis is away for those who wait, as it refuses them. What gets through all the same says redis.pcall for write: it then
-- notes nothing, and goes on.
local function touch(write)
  local silence = line > 0 and lineQuiet or quiet
  if touched and (now - touched > silence or touched > now) or not touched and redis.call('EXISTS', KEYS[2]) == 1 then
    resumed = now
  elseif touched and now - touched > math.max(interval, lineQuiet) and touched - resumed <= quiet then
    resumed = math.max(resumed, now - interval) -- a second silence: who was not back before it has the time to come back now
  end
  write = write or redis.call
  write('HSET', KEYS[6], 'created', created, 'touched', now, 'resumed', resumed, 'lost', lost, 'length', greatest, 'asked', asked)
end

-- tellLoss is for a caller that is older than what Redis knows. What is free then was made by some who could not know how many hold
-- a token, and is made anew once the holders are back.
local function tellLoss()
  if lost < created then -- else it has been told
    lost = now
    redis.call('DEL', KEYS[1])
  end
end

-- ask notes for what length somebody asks; touch writes it.
local function ask(length)
  if length >= greatest or now - asked > 300 or asked > now then
    greatest, asked = length, now
  end
end

-- settled reports whether holders have had the time to come back since the last silence, and since Redis has lost its data.
local function settled()
  return now - math.max(resumed, lost) > quiet
end

-- mayRefill reports whether what is missing may be replaced: those who hold it and are not counted have had the time to come back.
-- Somebody who was not in line before cannot know whether that may be, and does not wait for it, unless others have told.
local function mayRefill(newcomer)
  return settled() or newcomer and now - lost > quiet
end

-- catchUp brings scores that lie in the future, from before the clock was set back, to now: three hundred at most.
local function catchUp(key)
  local newest = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')[2]
  if newest and tonumber(newest) > now then
    for _, token in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. now, '+inf', 'LIMIT', 0, 300)) do
      redis.call('ZADD', key, now, token)
    end
  end
end

-- leave takes a token out of the line, and forgets its pod.
local function leave(token)
  redis.call('ZREM', KEYS[4], token)
  redis.call('HDEL', KEYS[5], token, token .. '/pod')
  return redis.call('ZREM', KEYS[3], token)
end

local grown = false -- this command may have made a key; see finish

-- tell notes the pod of a token, "NAME NODE", and since when it has it, unless that is known. An empty pod tells nothing.
local function tell(token, pod, since)
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

-- dropGone takes out of the line those that are gone, so that they block nobody: a hundred at most.
local function dropGone()
  if line > 0 and now - resumed > patience then
    for _, token in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', '(' .. (now - patience), 'LIMIT', 0, 100)) do
      leave(token)
    end
  end
end

-- send reports whether a waiter received a message; false if the ACL forbids PUBLISH.
local function send(token, message)
  local listeners = redis.pcall('PUBLISH', KEYS[3] .. '/' .. token, message)
  return type(listeners) == 'number' and listeners > 0
end

-- served walks along the line, a hundred waiters at most, in the order in which the free tokens are theirs: a waiter whose
-- length is used up lets those behind it pass. It calls visit for each that one is left for, and returns how many tokens are left
-- then, and how many would be in use.
local function served(visit, most)
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

-- call wakes those in line for whom a token is free, sixteen at most: each that takes its token calls the next. The one that is
-- asking need not be called.
local function call(asking)
  if line == 0 then
    return
  end
  dropGone()
  local calls = 0
  served(function(token)
    calls = calls + 1
    if token ~= asking and calls <= 16 then
      send(token, 'your turn')
    end
  end, 100)
end

-- trim takes out of the queue what is more than the greatest length allows. Where that is not known, as Redis has lost its data,
-- what is free is made anew when somebody asks.
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

-- count adds to what state says for people.
local function count(field, n)
  local before = redis.call('HMGET', KEYS[6], field)[1]
  redis.pcall('HSET', KEYS[6], field, string.format('%.0f', (tonumber(before) or 0) + n)) -- a full Redis does without
end

-- finish sees to it that the keys expire: within minutes once there are neither holders nor waiters. The time that state has left
-- tells of all of them, unless this command may have made one (grown). busy is for who knows that there are some.
local function finish(answer, busy)
  -- One by one: in a Cluster, keys that are on their way to another node can only be asked for alone.
  busy = busy or redis.call('EXISTS', KEYS[2]) + redis.call('EXISTS', KEYS[3]) > 0
  local seconds = busy and tonumber(ARGV[4]) or 300
  local left = redis.call('TTL', KEYS[6])
  if grown or left < seconds / 2 or left > seconds then
    for _, key in ipairs(KEYS) do
      redis.call('EXPIRE', key, seconds)
    end
  end
  return answer
end

