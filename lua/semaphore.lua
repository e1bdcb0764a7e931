-- The common part of all scripts. Redis gets this file, followed by the file of a script.
--
-- KEYS[1] queue     List, one item for each free token. The items have no meaning: a
--                   token gets its name when a pod takes it
-- KEYS[2] inflight  Sorted Set, token in use -> its last heartbeat (Unix seconds). A token
--                   has the name that the webhook gave it, until the first pod that
--                   confirms it gives it its UID; see heldAs. Until then, its score may
--                   be earlier, so that it is stale sooner. A pod that needs several has
--                   TOKEN, TOKEN/2, TOKEN/3 and so on, with one score
-- KEYS[3] waiters   Sorted Set, token of a waiter -> its place: its arrival (Unix
--                   microseconds), less its head start
-- KEYS[4] seen      Sorted Set, token of a waiter -> its last request (Unix seconds, with
--                   fractions)
-- KEYS[5] names     Hash, token of a waiter -> the length that it asks for, or
--                   LENGTH*TOKENS if it needs several tokens, with a sign: "+" if it
--                   received a message at its last request, "-" if it then missed a
--                   call; and TOKEN/pod of each pod with tokens or in line ->
--                   "SINCE NAME NODE": when its pod took it (Unix seconds; 0 of a
--                   waiter), the pod's name, and its node if that is known. Of a pod that
--                   waited for W seconds, "SINCE+W NAME NODE". Of a waiter
--                   that waits for a time, "0 NAME NODE SECONDS" or "... SECONDS run".
--                   TOKEN/gaveUp -> "WAITED gaveUp/N", how many seconds it waited, until
--                   it releases its token; and gaveUp/N -> TOKEN: so there are gaveUpMost
--                   of these at most
--                   TOKEN/ahead of a waiter with a head start -> microseconds
--                   TOKEN/first -> since when a waiter that needs several is the first that
--                   does not fit (Unix seconds), if there is an overtake
-- KEYS[6] state     Hash, times in Unix seconds:
--                     created    when Redis began to know the semaphore; while it was young,
--                                when it started
--                     touched    the last command
--                     resumed    the end of the last silence
--                     lost       when a caller reported that Redis has lost its data; or when
--                                Redis started, see the birth guard
--                     length     the greatest length that callers asked for lately
--                     asked      when a caller asked for that length
--                     interval   the greatest interval that callers sent lately
--                     threshold  the greatest threshold that they sent
--                     sent       when a caller sent one of these, ten seconds too early at most
--                     reclaimed  number of stale tokens taken back so far, for people
--                     rejoined   number of tokens put back by holders so far, for people
--                     gaveUp     number of waiters that gave up so far
--                     ranBeyond  number of tokens taken beyond the length so far, for people
--                     holds      how long the last pods had their tokens, one character for
--                                each; see addHold
--                     limit      the length that the owner of the resource set; empty: none
--                     override   another length for a time, which precedes the limit
--                     ends       when the override ends
--                     note, by   why and by whom it was set, for people
--                     kept       the keys live until then at least, for the limit
--                     overtake   seconds for which lighter waiters may pass the first that
--                                does not fit; with the limit
--                     lent       the length that a caller outside of the line asked for
--                     lentAt     when it asked
--                     lentTo     the arrival of the last waiter that may use it
--                   and, in Unix microseconds, while there is a line:
--                     heard      the last command
--                     paused     the end of the last pause between two commands
--                     reign      a part of the server's replication ID
--                     reigned    when Redis noted that
--                     joined     the arrival of the last waiter with a head start
-- KEYS[7] history   List, for people: how the time of the last pods with tokens or in line
--                   ended, the newest at the end. See noteEnd. It outlives the other keys
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
local pollMost = 3 -- seconds; the longest time between two requests of a live waiter
local lineQuiet = 5 -- seconds; with live waiters in line, commands come more often
local yourTurn = 'your turn' -- the message to a waiter that may take a free token

-- Without a request for this time, a waiter is gone. A live one asks within pollMost.
-- Then Redis may be away for lineQuiet unnoticed, and the waiter asks again within
-- pollMost. One more second is for fractions of seconds.
local linePatience = pollMost + lineQuiet + pollMost + 1

-- Redis cannot notice an outage of this time, in seconds. Live waiters ask again within
-- the same time after a longer one.
local stall = 1.5

-- Without a request for this time, others pass a waiter. A live one asks within pollMost.
local linePass = pollMost + stall

local lengthMemory = 300 -- seconds; the scripts forget an older greatest length
local settingsEvery = 10 -- seconds; the scripts note the same settings again after this time
local settingsMemory = 300 -- seconds, or twice the threshold; they forget older greatest settings
local idleLife = 300 -- seconds; the time to live without holders and waiters
local overrideMost = 8 * 86400 -- seconds; no override lasts longer, whatever the clock was
local aheadMost = 2 ^ 50 -- microseconds; a client may have written more than a script
local noteMost = 200 -- bytes of a note; a client may have written a longer one
local nameMost = 510 -- bytes of the name of a pod, likewise
local gaveUpMost = 1000 -- waiters that gave up and have not released their tokens
local tokensMost = 100 -- tokens that one pod needs; a client may have written more
local holdsMost = 64 -- characters of holds; with a longer value, state takes four times the memory
local holdFirst = 33 -- the code of the first of these; see addHold
local holdLast = 126
local holdStep = 0.16
local historyMost = 100 -- entries of the history; readers skip what precedes them
local historyTrim = 104 -- entries, at which the oldest are dropped: not at each command
local entryMost = 160 -- bytes of an entry: so the history takes 20 KB at most
local historyLife = 3 * 86400 -- seconds; the time to live of the history after its last entry

local state = redis.call('HMGET', KEYS[6], 'created', 'touched', 'resumed', 'lost', 'length', 'asked',
  'interval', 'threshold', 'sent', 'limit', 'override', 'ends', 'kept', 'holds')
-- A time in the future is from before the clock was set back.
local created, touched = math.min(tonumber(state[1]) or now, now), tonumber(state[2])
local resumed, lost = math.min(tonumber(state[3]) or 0, now), math.min(tonumber(state[4]) or 0, now)
local asks, asked = tonumber(state[5]) or 0, math.min(tonumber(state[6]) or 0, now)

-- whole returns a number that was written by a script, not by a client in another form.
local function whole(text)
  return text and string.match(text, '^%d+$') and tonumber(text)
end

-- The length that counts for all, whatever they ask for: of an override that has not
-- ended, or else the limit. It is nil if there is neither.
local limit, override, ends = state[10], whole(state[11]), whole(state[12]) or 0
if ends > now + overrideMost then
  ends = 0
end
local kept = math.min(whole(state[13]) or 0, now + overrideMost)
local set
local greatest -- the greatest length that counts for anybody
local function findLengths()
  set = ends > now and override or whole(limit)
  greatest = set or asks
end
findLengths()

-- The greatest interval and threshold that callers sent lately judge all holders: one with
-- longer settings than this caller's may live. A live one sends them again in time. A
-- silence of all callers ends no memory.
local interval, patience = tonumber(ARGV[2]), tonumber(ARGV[3])
local newSettings = true -- for touch to note
local knownInterval, knownPatience = tonumber(state[7]) or 0, tonumber(state[8]) or 0
local sentBefore = math.min(tonumber(state[9]) or 0, now)
if math.min(touched or now, now) - math.max(sentBefore, resumed) <= math.max(settingsMemory, 2 * knownPatience) then
  newSettings = interval > knownInterval or patience > knownPatience
    or now - sentBefore >= settingsEvery and (interval == knownInterval or patience == knownPatience)
  interval, patience = math.max(interval, knownInterval), math.max(patience, knownPatience)
end

-- If there is a live holder, a heartbeat comes at least this often.
local quiet = interval + math.min(beatTimeout, interval)

-- Redis does not notice a silence up to quiet. A live holder may miss a heartbeat at its
-- start, and must not be stale at its end.
local threshold = math.max(patience, 2 * quiet)

-- The birth guard: a server that started less than quiet ago may have replaced one that
-- knew this semaphore. That counts as a loss that a caller reported when it started. The
-- age is in whole seconds, as all times here are: the guard lasts a second longer, not
-- less. If the ACL forbids INFO, there is no guard.
if not state[1] then
  local text = redis.pcall('INFO', 'server')
  local age = tonumber(type(text) == 'string' and string.match(text, 'uptime_in_seconds:(%-?%d+)') or '')
  if age and age <= quiet then -- negative: the clock was set back
    created = now - math.max(0, age)
    lost = created
  end
end

local lineLength = redis.call('ZCARD', KEYS[3])
local line -- the functions and times that matter while there is a line; see openLine

-- addHold adds to holds, which touch writes, for how long a pod has had its tokens. pod is
-- what names has about it; a pod whose sidecar has not started does not count. "!" is one
-- second, and each next character is 17 % (e^0.16) longer.
local holds = string.sub(state[14] or '', -holdsMost)
local newHold = false
local refused = false -- Redis has refused what touch noted
local function addHold(pod)
  local since = tonumber(string.match(pod or '', '^(%d+)%+?%d* %S+ %S') or 0)
  if since > 0 then
    local steps = math.floor(math.log(math.max(1, now - since)) / holdStep + 0.5)
    newHold = true
    holds = string.sub(holds .. string.char(math.min(holdFirst + steps, holdLast)), -holdsMost)
  end
end

-- noteEnd adds an entry to the history: "ENDED HOW WAITED HELD TOKENS NAME NODE". ENDED is
-- in Unix seconds. HOW is released, reclaimed, byHand; or of a waiter left, lost (it asked no
-- more) or gaveUp. HELD is -1 if the pod had no tokens, or if Redis does not know since when.
-- NAME is "?" if it is not known, and ends in "-" if it is cut.
-- pod is what names has about it, and waited the seconds that a waiter has waited.
local function noteEnd(how, pod, tokens, waited)
  if refused then
    return
  end
  local since, before, name, node = string.match(pod or '', '^(%d+)%+?(%d*) (%S+)( ?%S*)')
  since = tonumber(since) or 0
  local text = string.format('%.0f %s %.0f %.0f %d %s', now, how, waited or tonumber(before) or 0,
    since > 0 and math.max(0, now - since) or -1, tokens, name or '?')
  if #text > entryMost then
    text = string.sub(text, 1, entryMost - 1) .. '-'
  elseif node and #text + #node <= entryMost then
    text = text .. node
  end
  local entries = redis.pcall('RPUSH', KEYS[7], text) -- another client may have replaced it
  if type(entries) == 'number' then
    redis.call('EXPIRE', KEYS[7], historyLife)
    if entries >= historyTrim then
      redis.call('LTRIM', KEYS[7], -historyMost, -1)
    end
  end
end

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
  if ends > 0 and ends <= now then -- a clock that is set back must not bring it back
    redis.call('HDEL', KEYS[6], 'override', 'ends', 'note', 'by')
    override, ends = nil, 0
  end
  write = write or redis.call
  local noted
  if newHold then
    noted = write('HSET', KEYS[6], 'created', created, 'touched', now, 'resumed', resumed, 'lost', lost,
      'length', asks, 'asked', asked, 'holds', holds)
  else
    noted = write('HSET', KEYS[6], 'created', created, 'touched', now, 'resumed', resumed, 'lost', lost,
      'length', asks, 'asked', asked)
  end
  refused = type(noted) ~= 'number'
  if newSettings then
    write('HSET', KEYS[6], 'interval', interval, 'threshold', patience, 'sent', now)
  end
  if lineLength > 0 then
    write('HSET', KEYS[6], 'heard', micros, 'paused', line.paused)
  end
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
  if length >= asks or now - asked > lengthMemory then
    asks, asked = length, now
    findLengths()
  end
end

-- settled reports whether holders have had the time to come back, since the last silence
-- and since a loss of data.
local function settled()
  return now - math.max(resumed, lost) > quiet
end

-- untilSettled returns the seconds until settled.
local function untilSettled()
  return math.max(resumed, lost) + quiet + 1 - now
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
  if newest and tonumber(newest) * 1000000 > micros then
    for _, token in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. now, '+inf', 'LIMIT', 0, 300)) do
      redis.call('ZADD', key, now, token)
    end
  end
end

-- wishOf returns the length that a waiter asks for, or nil, and the number of tokens that
-- it needs. text is what names has about it.
local function wishOf(text)
  local length = tonumber(text)
  if length then
    return math.abs(length), 1
  end
  local asks, needs = string.match(text or '', '^[+-]?(%d+)%*(%d+)$')
  return tonumber(asks), math.max(1, math.min(tonumber(needs) or 1, tokensMost))
end

-- waitedFor returns for how many seconds a waiter has waited, or nil if it is not in line.
-- ahead is what names has about its head start.
local function waitedFor(token, ahead)
  local place = tonumber(redis.call('ZSCORE', KEYS[3], token) or '')
  return place and math.max(0, now - math.floor((place + math.min(whole(ahead) or 0, aheadMost)) / 1000000))
end

-- leaveLine takes a token out of the line, and forgets its pod. how is for the history; nil:
-- the pod has got its tokens. It returns 1 if the token was in line.
local function leaveLine(token, how)
  local waited, known
  if how and lineLength > 0 then
    known = redis.call('HMGET', KEYS[5], token, token .. '/pod', token .. '/ahead')
    waited = waitedFor(token, known[3])
  end
  redis.call('HDEL', KEYS[5], token, token .. '/pod', token .. '/ahead', token .. '/first')
  if lineLength == 0 then
    return 0
  end
  redis.call('ZREM', KEYS[4], token)
  local left = redis.call('ZREM', KEYS[3], token)
  lineLength = lineLength - left
  if waited then
    local _, needs = wishOf(known[1])
    noteEnd(how, known[2], needs, waited)
  end
  return left
end

-- use puts the tokens of a pod in flight, or renews them: all or none. It returns how many
-- were not in flight before.
local function use(token, needs, score)
  if needs == 1 then
    return redis.call('ZADD', KEYS[2], score, token)
  end
  local members = {score, token}
  for i = 2, needs do
    members[2 * i - 1], members[2 * i] = score, token .. '/' .. i
  end
  return redis.call('ZADD', KEYS[2], unpack(members))
end

-- takeFree takes free tokens out of the queue, as far as there are any.
local function takeFree(n)
  if n == 1 then
    redis.call('LPOP', KEYS[1])
  elseif n > 1 then
    redis.call('LTRIM', KEYS[1], n, -1)
  end
end

-- life returns a time to live of the keys, in seconds: at least as long as something is
-- set that has to last.
local function life(seconds)
  return math.max(tonumber(seconds), kept - now, ends - now)
end

local grown = false -- this command may have created a key; see finish

-- notePod notes the pod of a token, "NAME NODE", since when the pod has the token, and how
-- long it waited, unless Redis knows that. Without a pod it notes nothing.
local function notePod(token, pod, since, waited)
  if pod == '' then
    return
  end
  local known = redis.call('HMGET', KEYS[5], token .. '/pod')[1]
  local at = string.match(known or '', '^[1-9]%d*%+?%d*')
  local text = (at or string.format(waited and '%.0f+%.0f' or '%.0f', since, waited)) .. ' ' .. pod
  if text ~= known then
    grown = grown or redis.call('EXISTS', KEYS[5]) == 0
    redis.pcall('HSET', KEYS[5], token .. '/pod', text) -- a full Redis does without
  end
end

-- heldAs returns the name under which a token is in use: its own; or takenAs, which the
-- webhook gave it when the pod had no UID yet, and which no pod has confirmed so far. It
-- returns nil if the token is not in use.
local function heldAs(token, takenAs)
  if redis.call('ZSCORE', KEYS[2], token) then
    return token
  end
  return takenAs ~= '' and redis.call('ZSCORE', KEYS[2], takenAs) and takenAs or nil
end

-- rename gives a token in use its own name: the first pod that confirms it owns it. A copy
-- of that pod has the same takenAs, and finds it gone.
local function rename(token, takenAs)
  redis.call('ZADD', KEYS[2], now, token)
  redis.call('ZREM', KEYS[2], takenAs)
  local pod = redis.call('HMGET', KEYS[5], takenAs .. '/pod')[1]
  if pod then
    redis.pcall('HSET', KEYS[5], token .. '/pod', pod) -- a full Redis does without
    redis.call('HDEL', KEYS[5], takenAs .. '/pod')
  end
end

-- dropGone takes waiters that are gone out of the line, at most 100: they must block no
-- other. asking is the caller's token: it is about to join again.
local function dropGone(asking)
  if lineLength > 0 and now - resumed > linePatience then
    local before = '(' .. (now - linePatience)
    for _, token in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', before, 'LIMIT', 0, 100)) do
      leaveLine(token, token ~= asking and 'lost')
    end
  end
end

-- publish reports whether a waiter received a message. It returns false if the ACL
-- forbids PUBLISH.
local function publish(token, message)
  local listeners = redis.pcall('PUBLISH', KEYS[3] .. '/' .. token, message)
  return type(listeners) == 'number' and listeners > 0
end

-- openLine makes the functions for a semaphore with a line. Most have none.
local function openLine()
  local known = redis.call('HMGET', KEYS[6], 'heard', 'paused', 'lent', 'lentAt', 'lentTo', 'reign', 'reigned',
    'joined', 'overtake')
  local heard, paused = tonumber(known[1]) or 0, tonumber(known[2]) or 0
  if heard > micros or paused > micros or micros - heard > stall * 1000000 then
    paused = micros
  end
  local lent, lentTo = tonumber(known[3]) or 0, tonumber(known[5]) or 0
  local noted = lentTo
  if math.abs(now - (tonumber(known[4]) or 0)) > linePatience then
    lent, lentTo = 0, 0
  end
  local reign, reigned = tonumber(known[6]) or 0, tonumber(known[7]) or 0
  local exact = micros / 1000000 -- Unix seconds, with a fraction

  -- lengthOf returns the length that counts for a waiter alone. text is what names has
  -- about it.
  local function lengthOf(text)
    return set or (wishOf(text)) or greatest
  end

  -- limitsOf returns the length that counts for each of some consecutive waiters, the
  -- first of which has the index from: the greatest of its own, of those behind it, of
  -- floor, and of one that it was lent. So no waiter is overtaken for its smaller length.
  local function limitsOf(texts, from, floor)
    local covered = lent > 0 and redis.call('ZCOUNT', KEYS[3], '-inf', lentTo) - from or 0
    local limits, behind = {}, floor
    for i = #texts, 1, -1 do
      behind = math.max(behind, lengthOf(texts[i]))
      limits[i] = math.min(greatest, i <= covered and math.max(behind, lent) or behind)
    end
    return limits
  end

  -- lend is for a caller that is not in line: the line comes first, so the present
  -- waiters may use the caller's length for a while.
  local function lend(length)
    local last = tonumber(redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')[2]) or 0
    if length >= lent or last > lentTo then
      redis.call('HSET', KEYS[6], 'lent', length, 'lentAt', now, 'lentTo', string.format('%.0f', last))
    end
  end

  -- comesAfterLoan ends a loan for the waiters from an arrival on: the pod came after the
  -- loan. By its clock, which is not Redis's, it may have come before.
  local function comesAfterLoan(arrival)
    if arrival <= noted then -- also of one that has ended: the clock may be set
      noted, lentTo = arrival - 1, math.min(lentTo, arrival - 1)
      redis.call('HSET', KEYS[6], 'lentTo', string.format('%.0f', noted))
    end
  end

  -- askedAt returns when a waiter asked last.
  local function askedAt(token)
    return tonumber(redis.call('ZSCORE', KEYS[4], token)) or 0
  end

  -- silentBefore returns the time before which live waiters have asked, or false if Redis
  -- cannot know: it was away shortly before.
  local silentSince
  local function silentBefore()
    if silentSince == nil then
      silentSince = false
      if micros - paused > stall * 1000000 and now - resumed > linePatience then
        local oldest = tonumber(redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')[2])
        silentSince = oldest and oldest < exact - linePass and exact - linePass
      end
    end
    return silentSince
  end

  -- isPassed reports whether a waiter keeps its place, but no other from a free token: it
  -- missed a call, or has not asked for too long.
  local function isPassed(token, text)
    if string.sub(text or '', 1, 1) == '-' then
      return true
    end
    local before = silentBefore()
    return before and askedAt(token) < before
  end

  -- sameReign reports whether this server is the primary that the semaphore knows,
  -- without a restart. If not, it notes the new one: there, waiters have yet to
  -- subscribe. It returns false if the ACL forbids INFO.
  local present
  local function sameReign()
    if not present then
      local text = redis.pcall('INFO', 'replication')
      local id = type(text) == 'string' and string.match(text, 'master_replid:(' .. string.rep('%x', 12) .. ')')
      present = id and tonumber(id, 16) or -1
    end
    if present < 0 or present == reign then
      return present == reign
    end
    reign, reigned = present, micros - micros % 1000 -- seen has milliseconds
    redis.pcall('HSET', KEYS[6], 'reign', string.format('%.0f', reign), 'reigned', string.format('%.0f', reigned))
    return false
  end

  -- call tells a waiter that a token is free for it. It returns false if nobody receives
  -- that, although the waiter received a message at its last request: then it has gone,
  -- or has lost its connection, and is passed until it asks again. call sends at most 16
  -- messages that are received: each waiter calls the next when it takes its token.
  local calls, called = 0, {}
  local function call(token, text)
    if called[token] or calls >= 16 then
      return true
    end
    if not publish(token, yourTurn) and string.sub(text or '', 1, 1) == '+' and sameReign()
      and askedAt(token) * 1000000 > reigned - 1 then
      redis.pcall('HSET', KEYS[5], token, '-' .. string.sub(text, 2))
      return false
    end
    calls, called[token] = calls + 1, true
    return true
  end

  -- letsPass reports whether a waiter that needs several tokens, and is the first that does
  -- not fit, lets lighter ones pass: for a time that the owner set. After that, what comes
  -- free is kept for it.
  local overtake = whole(known[9]) or 0
  local function letsPass(token)
    if overtake == 0 then
      return false
    end
    local since = tonumber(redis.call('HMGET', KEYS[5], token .. '/first')[1]) or now + 1
    if since > now then
      since = now
      redis.pcall('HSET', KEYS[5], token .. '/first', now) -- a full Redis does without
    end
    return now - since < overtake
  end

  -- eachServed goes along the line and gives each waiter its free tokens, up to the
  -- caller's place. It looks at a hundred waiters at once, and at the next hundred only
  -- if all of these are passed. visit receives each waiter that gets its tokens; it
  -- returns false if the waiter is passed. asking is the caller's token; floor is the
  -- length of a caller outside of the line, or 0. A waiter that needs more tokens than the
  -- length is passed.
  --
  -- eachServed returns the number of free tokens left, the number that is in use then,
  -- and the length that counts for the caller: 0 if others come first. kept is true if
  -- one of these needs more than is free: Redis keeps the free tokens for that waiter.
  local function eachServed(visit, asking, floor)
    local free, used = redis.call('LLEN', KEYS[1]), redis.call('ZCARD', KEYS[2])
    for from = 0, 400, 100 do
      if free == 0 or used >= greatest then
        return free, used, 0
      end
      local tokens = redis.call('ZRANGE', KEYS[3], from, from + 99)
      if #tokens == 0 then
        return free, used, floor
      end
      local texts = redis.call('HMGET', KEYS[5], unpack(tokens))
      local limits, served, passes = nil, 0, nil
      for i, token in ipairs(tokens) do
        if free == 0 then
          return free, used, 0
        end
        local mine = token == asking
        if mine or not isPassed(token, texts[i]) then
          local asks, needs = wishOf(texts[i])
          local limit = set or asks or greatest
          if used + needs > limit then -- its own length is used up
            limits = limits or limitsOf(texts, from, floor)
            limit = limits[i]
          end
          if mine then
            return free, used, limit
          elseif needs == 1 and used >= limit then
            return free, used, 0
          elseif used + needs > limit or free < needs then
            if needs <= limit then
              if passes == nil then
                passes = letsPass(token)
              end
              if not passes then
                return free, used, 0, true
              end
            end
          elseif visit(token, texts[i]) then
            free, used, served = free - needs, used + needs, served + 1
          end
        end
      end
      if #tokens < 100 then
        return free, used, floor
      elseif served > 0 then
        break
      end
    end
    return free, used, 0
  end

  line = {
    seconds = string.format('%d.%03d', time[1], math.floor(time[2] / 1000)), -- Unix seconds, with milliseconds
    paused = paused, joined = tonumber(known[8]) or 0, lentTo = lentTo, lend = lend, call = call,
    eachServed = eachServed, comesAfterLoan = comesAfterLoan, limitsOf = limitsOf, sameReign = sameReign,
    letsPass = letsPass,
  }
end
if lineLength > 0 then
  openLine()
end

-- callServed calls the waiters that may take a free token.
local function callServed()
  if lineLength > 0 then
    dropGone()
    line.eachServed(line.call, '', 0)
  end
end

-- refill makes missing free tokens, at most portion of them in all, if mayRefill. It
-- returns their number.
local portion = 256
local function refill(newcomer)
  local free = {}
  if mayRefill(newcomer) then
    -- Others ask for the greatest length, and it counts for the caller if they are behind
    -- it.
    local wanted = math.min(portion, greatest - redis.call('ZCARD', KEYS[2]))
    for i = 1, wanted - redis.call('LLEN', KEYS[1]) do
      free[i] = 'free'
    end
  end
  if #free > 0 then
    grown = true
    redis.call('RPUSH', KEYS[1], unpack(free))
  end
  return #free
end

-- trim takes free tokens beyond the greatest length out of the queue. The caller may know
-- how many are free, and in use. After a loss of data Redis does not know that length: then
-- trim takes all, and the next request makes new ones.
local function trim(free, used)
  local room = math.max(0, greatest - (used or redis.call('ZCARD', KEYS[2])))
  local surplus = (free or redis.call('LLEN', KEYS[1])) - room
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

-- count adds to a number of state that people read, and returns it.
local function count(field, n)
  local after = (tonumber(redis.call('HMGET', KEYS[6], field)[1]) or 0) + n
  redis.pcall('HSET', KEYS[6], field, string.format('%.0f', after)) -- a full Redis does without
  return after
end

-- noteGaveUp notes that a waiter has given up, until it releases its token. Redis forgets
-- the oldest of these notes if there are more than gaveUpMost.
local function noteGaveUp(token, waited)
  local place = string.format('gaveUp/%.0f', count('gaveUp', 1) % gaveUpMost)
  local oldest = redis.call('HMGET', KEYS[5], place)[1]
  if oldest then
    redis.call('HDEL', KEYS[5], oldest .. '/gaveUp')
  end
  grown = true
  redis.call('HSET', KEYS[5], place, token, token .. '/gaveUp', string.format('%.0f %s', waited, place))
end

-- holders returns four items for each of the five pods with the oldest heartbeats: the
-- seconds that the pod has had its tokens, the pod, and 1 if its sidecar has not started;
-- or -1, the token, and 0; and how many tokens it has.
local function holders()
  local tokens, counts, fields, place = {}, {}, {}, {}
  local members = redis.call('ZRANGE', KEYS[2], 0, 5) -- one more, which may be the fifth's
  if string.find(table.concat(members, ' '), '/', 1, true) then
    members = redis.call('ZRANGE', KEYS[2], 0, 5 * tokensMost - 1)
  end
  for _, member in ipairs(members) do
    local used = string.match(member, '^[^/]*')
    local i = place[used]
    if not i and #tokens < 5 then
      i = #tokens + 1
      place[used], tokens[i], counts[i], fields[i] = i, used, 0, used .. '/pod'
    end
    if i then
      counts[i] = counts[i] + 1
    end
  end
  local list, pods = {}, #fields > 0 and redis.call('HMGET', KEYS[5], unpack(fields))
  for i, used in ipairs(tokens) do
    local since, name, node = string.match(pods[i] or '', '^(%d+)%+?%d* (%S+) ?(%S*)')
    list[4 * i - 3] = since and math.max(0, now - since) or -1
    list[4 * i - 2] = string.sub(name or used, 1, nameMost)
    list[4 * i - 1] = node == '' and 1 or 0 -- only a sidecar knows its node
    list[4 * i] = counts[i]
  end
  return list
end

-- setting returns what the owner set: {}, {limit}, or {limit, override, when it ends,
-- note}. A limit of -1 is none. If Redis knows nothing of one, it is -2, or missing.
local function setting()
  local known = limit and (whole(limit) or -1) or -2
  if override and ends > now then
    return {known, override, ends, string.sub(redis.call('HMGET', KEYS[6], 'note')[1] or '', 1, noteMost)}
  end
  return known > -2 and {known} or {}
end

-- occupancy returns what a reply says to those that have to wait: the number of tokens in use,
-- and of waiters; length, which counts for the caller; doubt; holders, setting and holds.
-- doubt is 0, or the seconds until Redis knows whether some holders or waiters are gone.
local function occupancy(length, doubt)
  return redis.call('ZCARD', KEYS[2]), redis.call('ZCARD', KEYS[3]), length, doubt, holders(), setting(), holds
end

-- finish sets the time to live of the keys: minutes if there are neither holders nor
-- waiters, and nothing is set that has to last. All keys have the time to live of state,
-- unless this command may have created one (grown). busy says that there are holders or
-- waiters.
local function finish(answer, busy)
  busy = busy or lineLength > 0 or redis.call('EXISTS', KEYS[2]) == 1
  local seconds = life(busy and ARGV[4] or idleLife)
  local left = redis.call('TTL', KEYS[6])
  if grown or left < seconds / 2 or left > seconds + 1 then
    for i = 1, 6 do -- not of the history; see noteEnd
      redis.call('EXPIRE', KEYS[i], seconds)
    end
  end
  return answer
end
