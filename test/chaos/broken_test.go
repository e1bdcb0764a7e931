package chaos

import (
	"flag"
	"slices"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

var findWithin = flag.Duration("chaos.find", 4*time.Minute, "the longest time until the checker finds a broken script")

// broken is a program that the checker must find.
type broken struct {
	name  string
	edits []rig.Edit
	blow  string // the blow that exposes it; empty: none
	every time.Duration
	rush  bool
	owned bool     // the owners of semaphores set lengths
	rules []string // the checker must report one of them
}

var programs = []broken{
	{
		name: "a length is taken for one more",
		edits: []rig.Edit{
			{File: "lua/acquire.lua", From: "local length = set or asksFor", To: "local length = set or asksFor + 1"},
			{File: "lua/maintain.lua", From: "noteLength(tonumber(ARGV[5]))", To: "noteLength(tonumber(ARGV[5]) + 1)"},
		},
		rules: []string{ruleCount, ruleLetIn},
	}, {
		name: "a pod that does not wait ignores the line",
		edits: []rig.Edit{{File: "lua/acquire.lua",
			From: "  if lineLength == 0 then\n    return true",
			To:   "  if lineLength == 0 or not waits then\n    return true"}},
		rush:  true,
		rules: []string{ruleOrder},
	}, {
		name: "a gate is lifted without a token",
		edits: []rig.Edit{{File: "gate_line.go",
			From: "state != podHolds || gone || !p.isGated()",
			To:   "state == podEnded || gone || !p.isGated()"}},
		rules: []string{ruleLifted},
	}, {
		name: "a token is stale after a third of the threshold",
		edits: []rig.Edit{{File: "lua/semaphore.lua",
			From: "math.max(patience, 2 * quiet)",
			To:   "patience / 3"}},
		blow: briefPause, every: time.Second,
		rules: []string{ruleCount, ruleLetIn},
	}, {
		name: "a heartbeat does not put back a lost token",
		edits: []rig.Edit{{File: "lua/heartbeat.lua",
			From: "use(token, tonumber(ARGV[9]) or 1, now)",
			To:   "redis.call('ZADD', KEYS[2], 'XX', now, token)"}},
		blow: dataLoss, every: 20 * time.Second,
		rules: []string{ruleCount, ruleLetIn},
	}, {
		name: "there is no birth guard",
		edits: []rig.Edit{{File: "lua/semaphore.lua",
			From: "if age and age <= quiet then",
			To:   "if false then"}},
		blow: emptyStart, every: 15 * time.Second,
		rules: []string{ruleCount, ruleLetIn},
	}, {
		name: "a repair does not reclaim",
		edits: []rig.Edit{{File: "lua/maintain.lua",
			From: "if settled() then\n  local stale",
			To:   "if false then\n  local stale"}},
		blow: death, every: time.Minute,
		rules: []string{ruleUnused, ruleFree, ruleDecided},
	}, {
		name: "what the owner sets does not count",
		edits: []rig.Edit{{File: "lua/semaphore.lua",
			From: "set = ends > now and override or whole(limit)",
			To:   "set = nil"}},
		owned: true,
		rules: []string{ruleCount, ruleLetIn, ruleLifted},
	}, {
		name: "a heartbeat keeps one of several tokens",
		edits: []rig.Edit{{File: "lua/heartbeat.lua",
			From: "use(token, tonumber(ARGV[9]) or 1, now)",
			To:   "use(token, 1, now)"}},
		rules: []string{ruleCount, ruleLetIn},
	}, {
		name: "lighter pods pass one that needs several",
		edits: []rig.Edit{{File: "lua/semaphore.lua",
			From: "              if not passes then\n",
			To:   "              if false then\n"}},
		rules: []string{ruleOrder},
	},
}

// TestChaosFindsBrokenScripts breaks the program in one way after another, and requires
// the checker to find each. Each world gets only the blow that exposes the defect, which
// saves time.
func TestChaosFindsBrokenScripts(t *testing.T) {
	for _, c := range programs {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := startWorld(t, rig.BuildBroken(t, c.edits), "")
			w.rush = c.rush
			// Gated pods send fewer requests: it takes longer to find the other defects
			// with them.
			w.gating = slices.Contains(c.rules, ruleLifted)
			w.populate(*seedFlag, *podCount)
			defer w.finish()
			if c.owned {
				defer w.startOwners(*seedFlag)()
			}
			n := newNemesis(w, *seedFlag)
			last := ""
			for next := 5 * time.Second; n.now() < *findWithin; time.Sleep(time.Second) {
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
			t.Errorf("not found within %s; the checker found %q; the history is in %s",
				*findWithin, last, w.keep(w.history(), *seedFlag))
		})
	}
}

// What TestChaosFindsBrokenScripts breaks is in the program of today.
func TestChaosCheckerHasBrokenScripts(t *testing.T) {
	for _, c := range programs {
		rig.EditedFiles(t, c.edits)
	}
}
