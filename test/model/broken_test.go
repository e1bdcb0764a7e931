package model

import (
	"os"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"pgregory.net/rapid"
)

// TestModelFindsBrokenScripts breaks the scripts in one way after another. Sequences like
// those of TestModel must find each defect. Some take thousands of commands.
func TestModelFindsBrokenScripts(t *testing.T) {
	if os.Getenv("SUITE") != "1" {
		t.Skip("this takes minutes; run it with: make chaos")
	}
	t.Parallel()
	const most = 2000 // sequences for each broken script
	s := newStore(t, scripts{})
	for _, c := range []struct{ name, from, to string }{
		{"the length is one more",
			"local length = tonumber(ARGV[5])\nlocal token",
			"local length = tonumber(ARGV[5]) + 1\nlocal token"},
		{"a pod may take a token beyond the length",
			"return free > 0 and used < most\n",
			"return free > 0\n"},
		{"a pod that does not wait ignores the line",
			"  if lineLength == 0 then\n    return true",
			"  if not waits then\n    return true"},
		{"a pod ignores the waiters ahead",
			"  if lineLength == 0 then\n    return true",
			"  if true then\n    return true"},
		{"a waiter with a smaller length is overtaken",
			"behind = math.max(behind, lengthOf(texts[i]))",
			"behind = math.max(floor, lengthOf(texts[i]))"},
		{"the greatest length in line counts for all",
			"            limit = limits[i]\n",
			"            limit = limits[1]\n"},
		{"a caller outside of the line lends its length to nobody",
			"if length >= lent or last > lentTo then",
			"if false then"},
		{"a lent length counts for ever",
			"if math.abs(now - (tonumber(known[4]) or 0)) > linePatience then",
			"if false then"},
		{"a lent length counts for later waiters",
			"limits[i] = math.min(greatest, i <= covered and",
			"limits[i] = math.min(greatest, lent > 0 and"},
		{"a repair makes tokens for the caller's own length only",
			"math.min(portion, greatest - redis",
			"math.min(portion, tonumber(ARGV[5]) - redis"},
		{"a waiter that fell silent is not passed",
			"return before and askedAt",
			"return false and askedAt"},
		{"a silent waiter is passed too early",
			"local linePass = pollMost + stall",
			"local linePass = 2"},
		{"silent waiters are passed in a pause",
			"if micros - paused > stall * 1000000 and now - resumed > linePatience then",
			"if now - resumed > linePatience then"},
		{"silent waiters are passed though Redis was away",
			"if micros - paused > stall * 1000000 and now - resumed > linePatience then",
			"if micros - paused > stall * 1000000 then"},
		{"a waiter that misses a call is not passed",
			"      return false\n    end\n    calls, called",
			"    end\n    calls, called"},
		{"a waiter that never listened is passed if it misses a call",
			"string.sub(text or '', 1, 1) == '+' and sameReign()",
			"sameReign()"},
		{"a waiter is passed that misses a call after a restart",
			"if present < 0 or present == reign then\n      return present == reign\n",
			"if true then\n      return true\n"},
		{"a waiter is passed that has not asked since a restart",
			"* 1000000 > reigned - 1 then",
			"* 1000000 > 0 then"},
		{"a waiter that asks again stays passed",
			"  if known ~= text then",
			"  if known ~= text and string.sub(known, 1, 1) ~= '-' then"},
		{"keep does not note the lengths",
			"  noteLength(most)\n",
			""},
		{"keep does not clear what a waiter heard",
			"    if not place or texts[n] ~= length then",
			"    if not place then"},
		{"a waiter that comes back goes to the end of the line",
			"if arrival == '0' then",
			"if waits then"},
		{"a second release gives back another token",
			"if released == 1 then",
			"if true then"},
		{"a release loses the token",
			"grown = redis.call('RPUSH', KEYS[1], 'free') == 1",
			"grown = true"},
		{"a pod that confirms its token keeps the webhook's, too",
			"  redis.call('ZREM', KEYS[2], takenAs)\n",
			""},
		{"a pod does not find the token that the webhook took",
			"return takenAs ~= '' and redis.call('ZSCORE', KEYS[2], takenAs) and takenAs or nil",
			"return nil"},
		{"the name of the pod is lost when it confirms its token",
			"    redis.pcall('HSET', KEYS[5], token .. '/pod', pod)",
			"    --"},
		{"Redis keeps the pod of the webhook's token",
			"    redis.call('HDEL', KEYS[5], takenAs .. '/pod')\n  end",
			"  end"},
		{"a pod that leaves the line gives back the webhook's token, too",
			"if released + status == 0 and takenAs ~= '' then",
			"if takenAs ~= '' then"},
		{"a token that was never confirmed is not given back",
			"  released = redis.call('ZREM', KEYS[2], takenAs)",
			"  -- "},
		{"a holder is judged by shorter settings than its own",
			"  interval, patience = math.max(interval, knownInterval), math.max(patience, knownPatience)\n",
			""},
		{"a token that no pod has confirmed is in use for the whole threshold",
			"now - threshold + unstarted, token",
			"now, token"},
		{"late commands run",
			"if micros > tonumber(ARGV[1]) then",
			"if false then"},
		{"silences do not count",
			"return now - math.max(resumed, lost) > quiet",
			"return true"},
		{"Redis does not notice that its clock was set back",
			" or touched > now) or",
			") or"},
		{"a waiter does not report a loss of data",
			"tonumber(arrival) < created * 1000000) then",
			"false) then"},
		{"a waiter does not report a loss if it joined after it by the clock",
			"(not state[1] or tonumber(arrival) <",
			"(tonumber(arrival) <"},
		{"a holder does not report a loss of data",
			"if evicted or since < created then",
			"if evicted then"},
		{"there is no birth guard",
			"if age and age <= quiet then",
			"if false then"},
		{"the birth guard ends too early",
			"if age and age <= quiet then",
			"if age and 2 * age < interval then"},
		{"the birth guard does not hold back newcomers",
			"settled() or newcomer and now - lost > quiet",
			"settled() or newcomer"},
		{"the birth guard begins with the first command",
			"    created = now - math.max(0, age)\n    lost = created",
			"    created = now - math.max(0, age)\n    lost = now"},
		{"a loss of data is reported for ever",
			"if lost < created then",
			"if now - lost > quiet then"},
		{"a report of a loss leaves the free tokens",
			"    lost = now\n    redis.call('DEL', KEYS[1])\n",
			"    lost = now\n"},
		{"a pod that takes a token stays in line",
			"  if lineLength > 0 then\n    leaveLine(token)\n  end\n  if held",
			"  if held"},
		{"a holder that rejoins stays in line",
			"may have the token in line again.\n  leaveLine(token)",
			""},
		{"a holder that rejoins leaves a free token",
			"  redis.call('LPOP', KEYS[1])\n  count",
			"  count"},
		{"a release does not trim",
			"  trim()\n  status = 1",
			"  status = 1"},
		{"a release calls nobody",
			"  status = 1\nend\ncallServed()",
			"  status = 1\nend"},
		{"scores in the future stay there",
			"if newest and tonumber(newest) * 1000000 > micros then",
			"if false then"},
		{"a repair does not reclaim",
			"if settled() then\n  local stale",
			"if false then\n  local stale"},
		{"a repair does not refill",
			"if mayRefill(ARGV[6] == '1') then",
			"if false then"},
		{"a repair counts stale tokens as in use",
			"math.min(portion, greatest - redis.call('ZCARD', KEYS[2]))",
			"math.min(portion, greatest - redis.call('ZCARD', KEYS[2]) - reclaimed)"},
		{"dead waiters stay in line",
			"if lineLength > 0 and now - resumed > linePatience then",
			"if false then"},
		{"waiters are dropped though Redis was away",
			"if lineLength > 0 and now - resumed > linePatience then",
			"if lineLength > 0 then"},
		{"acquire does not note the pod",
			"  notePod(token, pod, now)\n",
			""},
		{"a heartbeat does not note the pod",
			"notePod(token, ARGV[6], since)",
			""},
		{"acquire notes a holder as a waiter",
			"  notePod(token, pod, now)\n",
			"  notePod(token, pod, 0)\n"},
		{"Redis keeps the pod of a waiter that leaves",
			"redis.call('HDEL', KEYS[5], token, token .. '/pod')",
			"redis.call('HDEL', KEYS[5], token)"},
		{"Redis keeps the pod of a stale token",
			"    redis.call('HDEL', KEYS[5], unpack(pods))\n",
			""},
		{"hold puts back a token that is not in use",
			"if redis.call('ZSCORE', KEYS[2], ARGV[i]) then\n    redis.call('ZADD'",
			"if true then\n    redis.call('ZADD'"},
		{"hold keeps nothing",
			"    redis.call('ZADD', KEYS[2], now, ARGV[i])\n",
			""},
		{"keep does not see holders",
			"if redis.call('ZSCORE', KEYS[2], token) then\n    held",
			"if false then\n    held"},
		{"keep leaves pods in line that are gone",
			"    leaveLine(ARGV[i])\n",
			""},
		{"keep takes the names of holders",
			"if redis.call('ZSCORE', KEYS[3], ARGV[i]) then",
			"if true then"},
		{"keep moves places back",
			"tonumber(place) > tonumber(arrival)",
			"tonumber(place) ~= tonumber(arrival)"},
		{"keep does not note that it saw the waiters",
			"    redis.call('ZADD', KEYS[4], line.seconds, token)\n    if not place",
			"    if not place"},
		{"keep calls nobody",
			"if first > 7 then\n  callServed()",
			"if false then\n  callServed()"},
		{"keep returns too few served tokens",
			"  served[#served + 1] = token\n",
			"  served[1] = token\n"},
		{"keys do not expire",
			"if grown or left < seconds / 2 or left > seconds then",
			"if false then"},
	} {
		t.Run(c.name, func(t *testing.T) {
			broken := s
			broken.scripts = breakScripts(t, c.from, c.to)
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

// breakScripts replaces a text that occurs exactly once in the scripts.
func breakScripts(t *testing.T, from, to string) scripts {
	t.Helper()
	places := 0
	for _, name := range []string{"semaphore", "acquire", "maintain", "heartbeat", "release", "keep", "hold"} {
		places += strings.Count(rig.ReadFile(t, "lua/"+name+".lua"), from)
	}
	if places != 1 {
		t.Fatalf("%q is %d times in the scripts", from, places)
	}
	return scriptsOf(t, func(name string) string { return strings.Replace(rig.ScriptSource(name), from, to, 1) })
}

// findBroken plays one sequence. It returns the rule that the scripts break, or "".
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
