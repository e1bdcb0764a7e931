-- What the scripts share that know the line of the waiters; it is put before each of them.
--
-- KEYS[1] queue     List of the free tokens
-- KEYS[2] inflight  Sorted Set, token -> time of the last heartbeat (Unix seconds, this server's clock)
-- KEYS[3] waiters   Sorted Set, token that a waiter asks for -> when it joined the line (Unix microseconds)
-- KEYS[4] seen      Sorted Set, the same tokens -> when the waiter asked last (Unix seconds)
--
-- A waiter listens on the channel that is named by KEYS[3], a slash and its token.

local time = redis.call('TIME')
local now = tonumber(time[1])

local function leave(token)
  redis.call('ZREM', KEYS[4], token)
  return redis.call('ZREM', KEYS[3], token)
end

-- send tells whether a waiter has got a message. Where that is not allowed, it has not.
local function send(token, message)
  local listeners = redis.pcall('PUBLISH', KEYS[3] .. '/' .. token, message)
  return type(listeners) == 'number' and listeners > 0
end

-- call wakes as many of the first waiters as there are free tokens. One that cannot be reached, and has not asked for longer
-- than live waiters ever let pass (5 s), is gone: it is dropped, so that it blocks nobody. The one who is asking need not be
-- called.
local function call(asking)
  local free = redis.call('LLEN', KEYS[1])
  local called = 0
  while called < free do
    local token = redis.call('ZRANGE', KEYS[3], called, called)[1]
    if not token then
      return
    end
    if token == asking or send(token, 'your turn') or now - tonumber(redis.call('ZSCORE', KEYS[4], token) or 0) <= 5 then
      called = called + 1
    else
      leave(token)
    end
  end
end

-- renew sees to it that the keys expire when nobody uses them for long.
local function renew(seconds)
  for _, key in ipairs(KEYS) do
    if redis.call('TTL', key) < seconds / 2 then
      redis.call('EXPIRE', key, seconds)
    end
  end
end

