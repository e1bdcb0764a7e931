//go:build chaos

package main

import (
	"flag"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

var chaosFind = flag.Duration("chaos.find", 4*time.Minute, "for how long a broken script may stay unnoticed")

// TestChaosFindsBrokenScripts breaks the scripts of the program in one way after the other, and wants the checker to find each. Of all
// blows, a world gets those that are to show it, so that it does not take long.
func TestChaosFindsBrokenScripts(t *testing.T) {
	for _, c := range []struct {
		name  string
		edits []rig.Edit
		blow  string
		every time.Duration // between two blows
		rush  bool
		rules []string // one of which is to be broken
	}{
		{"a length is taken for one more", []rig.Edit{{File: "lua/acquire.lua", From: "local length = tonumber(ARGV[5])", To: "local length = tonumber(ARGV[5]) + 1"},
			{File: "lua/maintain.lua", From: "local length = tonumber(ARGV[5])", To: "local length = tonumber(ARGV[5]) + 1"}},
			"", time.Second, false, []string{ruleCount, ruleLetIn}},
		{"who does not wait ignores the line", []rig.Edit{{File: "lua/acquire.lua", From: "redis.call('ZRANK', KEYS[3], token) or redis.call('ZCARD', KEYS[3])", To: "redis.call('ZRANK', KEYS[3], token) or 0"}}, "", time.Second, true, []string{ruleOrder}},
		{"a gate is lifted without a token", []rig.Edit{{File: "gate_line.go", From: "state != podHolds || gone || !p.isGated()", To: "state == podEnded || gone || !p.isGated()"}},
			"", time.Second, false, []string{ruleLifted}},
		{"a token is stale after a third of the threshold", []rig.Edit{{File: "lua/semaphore.lua", From: "math.max(tonumber(ARGV[3]), 2 * quiet)", To: "tonumber(ARGV[3]) / 3"}},
			briefPause, time.Second, false, []string{ruleCount, ruleLetIn}},
		{"a heartbeat does not put back what was lost", []rig.Edit{{File: "lua/heartbeat.lua", From: "redis.call('ZADD', KEYS[2], now, ARGV[5])", To: "redis.call('ZADD', KEYS[2], 'XX', now, ARGV[5])"}}, dataLoss, 20 * time.Second, false, []string{ruleCount, ruleLetIn}},
		{"a repair does not reclaim", []rig.Edit{{File: "lua/maintain.lua", From: "if settled() then\n  local stale", To: "if false then\n  local stale"}},
			death, time.Minute, false, []string{ruleUnused, ruleFree, ruleDecided}},
		{"silences do not count", []rig.Edit{{File: "lua/semaphore.lua", From: "return now - math.max(resumed, lost) > quiet", To: "return true"}},
			longOutage, 10 * time.Second, false, []string{ruleCount, ruleLetIn}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := startChaos(t, rig.BuildBroken(t, c.edits), "")
			w.rush = c.rush
			w.gating = slices.Contains(c.rules, ruleLifted) // where pods are gated, fewer ask, and the others take long to be found
			w.populate(*chaosSeed, *chaosPods)
			defer w.finish()
			n := &nemesis{w, rand.New(rand.NewPCG(*chaosSeed, 1<<32)), map[string]int{}}
			last := ""
			for next := 5 * time.Second; n.now() < *chaosFind; time.Sleep(time.Second) {
				if c.blow != "" && n.now() > next {
					n.strikeNamed(c.blow)
					next = n.now() + c.every
				}
				for _, v := range check(w.history()).found {
					last = v.String()
					if slices.Contains(c.rules, v.rule) {
						t.Logf("found after %.1f s: %s", n.now().Seconds(), v)
						return
					}
				}
			}
			t.Errorf("not found within %s; found was %q, kept in %s", *chaosFind, last, w.keep(w.history(), *chaosSeed))
		})
	}
}
