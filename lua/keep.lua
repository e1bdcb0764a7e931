-- keep keeps the places of many pods in line at once, for a process that stands there for
-- them. It takes no token: a pod whose turn it is takes its token by acquire. The pod's
-- arrival determines its place. So a place survives a restart of the process, and a loss
-- of data. keep also takes pods that are gone out of the line, but gives no token back.
--
-- KEYS, ARGV[1..4], and what every script returns: see semaphore.lua
-- ARGV[5] known   created, as the script returned it before (Unix seconds); 0 the first
--                 time
-- ARGV[6] gone    number of pods that leave
-- ARGV[7...]      their tokens. Then five for each pod in line: token, arrival (Unix
--                 microseconds), length or LENGTH*TOKENS, "NAME NODE" or the part that is
--                 known, and its head start in microseconds
--
-- Returns {1, time, created, served, held, joined, occupancy (seven items, see semaphore.lua)}
--   served  list of the tokens in line, also of other processes, that may take a free one
--   held    list of the given tokens that are in use already
--   joined  list of the given tokens that were not in line, each followed by its position
--   doubt   of occupancy; before it is over, Redis makes no token
local known = tonumber(ARGV[5])
local first = 7 + tonumber(ARGV[6])
if known > 0 and (not state[1] or created > known) then
  noteLoss()
end
local tokens, texts, most = {}, {}, 0
for i = first, #ARGV, 5 do
  tokens[#tokens + 1] = ARGV[i]
  most = math.max(most, (wishOf(ARGV[i + 2])))
end
if most > 0 then
  if lineLength == 0 then
    openLine()
  end
  noteLength(most)
  texts = redis.call('HMGET', KEYS[5], unpack(tokens))
end
touch()
clampFuture(KEYS[2])
clampFuture(KEYS[4])
local held, new = {}, {}
for i = 7, first - 1 do
  if redis.call('ZSCORE', KEYS[3], ARGV[i]) then -- a token in use keeps the name of its pod
    leaveLine(ARGV[i], 'left')
  end
end
for n, token in ipairs(tokens) do
  local i = first + 5 * (n - 1)
  local length, ahead = ARGV[i + 2], tonumber(ARGV[i + 4])
  local wanted = tonumber(ARGV[i + 1]) - ahead
  if redis.call('ZSCORE', KEYS[2], token) then
    held[#held + 1] = token
  else
    local place = redis.call('ZSCORE', KEYS[3], token)
    if not place or tonumber(place) > wanted then
      grown = true
      redis.call('ZADD', KEYS[3], string.format('%.0f', wanted), token)
      if ahead > 0 then
        redis.call('HSET', KEYS[5], token .. '/ahead', ahead)
      end
      notePod(token, ARGV[i + 3], 0)
    end
    if not place or texts[n] ~= length then -- with a sign: it may hear nothing any more
      redis.call('HSET', KEYS[5], token, length)
    end
    redis.call('ZADD', KEYS[4], line.seconds, token)
    if not place then
      new[#new + 1] = token
      line.comesAfterLoan(wanted)
    end
  end
end
lineLength = redis.call('ZCARD', KEYS[3])
dropGone()
if first > 7 then
  callServed()
end
local joined, served = {}, {}
for _, token in ipairs(new) do
  joined[#joined + 1] = token
  joined[#joined + 1] = (redis.call('ZRANK', KEYS[3], token) or 0) + 1
end
if lineLength > 0 then
  line.eachServed(function(token)
    served[#served + 1] = token
    return true
  end, '', 0)
end
local inflight = redis.call('ZCARD', KEYS[2])
local doubt = inflight < greatest and redis.call('LLEN', KEYS[1]) == 0 and not settled() and untilSettled() or 0
return finish({1, micros, created, served, held, joined, occupancy(greatest, doubt)})
