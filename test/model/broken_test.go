package model

import (
	"strings"
	"testing"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"pgregory.net/rapid"
)

// TestModelFindsBrokenScripts breaks the scripts in one way after the other, and wants sequences like TestModel's to find each.
func TestModelFindsBrokenScripts(t *testing.T) {
	t.Parallel()
	const most = 500 // sequences for each
	s := newStore(t, programScripts())
	for _, c := range []struct{ name, old, new string }{
		{"a length is taken for one more", "local length = tonumber(ARGV[5])\nlocal token", "local length = tonumber(ARGV[5]) + 1\nlocal token"},
		{"a token may be taken beyond the length", "return free > 0 and used < length\n", "return free > 0\n"},
		{"who does not wait ignores the line", "local before = ahead()", "local before = waits and ahead() or 0"},
		{"those ahead are ignored", "return waits and redis.call('ZRANK', KEYS[3], token) or redis.call('ZCARD', KEYS[3])", "return 0"},
		{"one whose length is used up blocks the line", "if used < (tonumber(lengths[i]) or math.huge) then", "if true then"},
		{"those who come back go to the end of the line", "if arrival == '0' then", "if waits then"},
		{"a second release gives back, too", "if redis.call('ZREM', KEYS[2], ARGV[5]) == 1 then", "redis.call('ZREM', KEYS[2], ARGV[5])\nif true then"},
		{"a release loses the token", "grown = redis.call('RPUSH', KEYS[1], 'free') == 1", "grown = true"},
		{"late commands are carried out", "if micros > tonumber(ARGV[1]) then", "if false then"},
		{"silences do not count", "return now - math.max(resumed, lost) > quiet", "return true"},
		{"Redis does not notice that its clock was set back", " or touched > now) or", ") or"},
		{"a waiter does not tell of a loss of data", "tonumber(arrival) < created * 1000000) then", "false) then"},
		{"a waiter does not tell of a loss where it joined after it by the clock", "(not state[1] or tonumber(arrival) <", "(tonumber(arrival) <"},
		{"a holder does not tell of a loss of data", "if since < created and", "if false and"},
		{"a loss of data is told for ever", "if lost < created then -- else", "if now - lost > quiet then -- else"},
		{"what was free when a loss was told can be taken", "    redis.call('DEL', KEYS[1])\n  end\nend\n\n-- ask", "  end\nend\n\n-- ask"},
		{"who takes a token stays in line", "    leave(token)\n    call()\n", "    call()\n"},
		{"who rejoins stays in line", "  leave(ARGV[5])", "  -- "},
		{"who rejoins leaves a token free", "  redis.call('LPOP', KEYS[1])\n  count", "  count"},
		{"a release does not trim", "  trim()\n  status = 1", "  status = 1"},
		{"a release calls nobody", "  status = 1\nend\ncall()", "  status = 1\nend"},
		{"the future is not caught up with", "if newest and tonumber(newest) > now then", "if false then"},
		{"a repair does not reclaim", "if settled() then\n  local stale", "if false then\n  local stale"},
		{"a repair does not refill", "if mayRefill(ARGV[6] == '1') then", "if false then"},
		{"a repair counts stale tokens as in use", "math.min(portion, length - redis.call('ZCARD', KEYS[2]))",
			"math.min(portion, length - redis.call('ZCARD', KEYS[2]) - reclaimed)"},
		{"the dead stay in line", "if line > 0 and now - resumed > patience then", "if false then"},
		{"those in line are dropped though Redis was away", "if line > 0 and now - resumed > patience then", "if line > 0 then"},
		{"a pod is not told", "  tell(token, pod, now)\n", ""},
		{"a heartbeat does not tell the pod", "tell(ARGV[5], ARGV[6], since)", ""},
		{"who takes a token counts as a waiter", "  tell(token, pod, now)\n", "  tell(token, pod, 0)\n"},
		{"the pod of who leaves is kept", "redis.call('HDEL', KEYS[5], token, token .. '/pod')", "redis.call('HDEL', KEYS[5], token)"},
		{"the pod of a stale token is kept", "    redis.call('HDEL', KEYS[5], unpack(pods))\n", ""},
		{"hold puts back what is not there", "if redis.call('ZSCORE', KEYS[2], ARGV[i]) then\n    redis.call('ZADD'", "if true then\n    redis.call('ZADD'"},
		{"hold keeps nothing", "    redis.call('ZADD', KEYS[2], now, ARGV[i])\n", ""},
		{"keep does not see who holds", "if redis.call('ZSCORE', KEYS[2], token) then\n    held", "if false then\n    held"},
		{"keep leaves those in line who are gone", "    leave(ARGV[i])\n", ""},
		{"keep takes the names of holders", "if redis.call('ZSCORE', KEYS[3], ARGV[i]) then -- else", "if true then -- else"},
		{"keep moves places back", "tonumber(place) > tonumber(arrival)", "tonumber(place) ~= tonumber(arrival)"},
		{"keep does not note who was seen", "    redis.call('ZADD', KEYS[4], now, token)\n    if not place", "    if not place"},
		{"keep calls nobody", "if first > 7 then\n  call()", "if false then\n  call()"},
		{"keep says too few are served", "end, 100)\nreturn finish({1, micros, created", "end, 1)\nreturn finish({1, micros, created"},
		{"keys do not expire", "if grown or left < seconds / 2 or left > seconds then", "if false then"},
	} {
		t.Run(c.name, func(t *testing.T) {
			broken := s
			broken.scripts = breakScripts(t, c.old, c.new)
			for seed := range most {
				if rule := findBroken(broken, seed); rule != "" {
					t.Logf("found by sequence %d: %s", seed+1, rule)
					return
				}
			}
			t.Errorf("not found in %d sequences", most)
		})
	}
}

// breakScripts replaces what is once in the scripts' sources.
func breakScripts(t *testing.T, from, to string) scripts {
	t.Helper()
	places := 0
	for _, name := range []string{"semaphore", "acquire", "maintain", "heartbeat", "release", "keep", "hold"} {
		places += strings.Count(rig.ReadFile(t, "lua/"+name+".lua"), from)
	}
	if places != 1 {
		t.Fatalf("%q is %d times in the scripts", from, places)
	}
	changed := func(name string) *redis.Script {
		return rig.NewScript(strings.Replace(rig.ScriptSource(name), from, to, 1))
	}
	return scripts{
		acquire: changed("acquire"), maintain: changed("maintain"), heartbeat: changed("heartbeat"),
		release: changed("release"), keep: changed("keep"), hold: changed("hold"),
	}
}

// findBroken plays one sequence; it returns the rule that the scripts break, or "".
func findBroken(s store, seed int) string {
	type found string
	return rapid.Custom(func(t *rapid.T) (rule string) {
		defer func() {
			switch r := recover().(type) {
			case nil:
			case found:
				rule = string(r)
			default:
				panic(r)
			}
		}()
		playModel(t, s, func(rule string) { panic(found(rule)) })
		return ""
	}).Example(seed)
}
