package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/gomodule/redigo/redis"
)

// breakVariable is the environment variable that names what is to be broken in the scripts that TestModel plays to.
const breakVariable = "BREAK_SCRIPTS"

// breaks are ways to break the scripts: a text, and what takes its place.
var breaks = map[string][2]string{
	"the own length does not count":   {"if inflight < length and redis.call('LLEN', KEYS[1]) > 0 then", "if redis.call('LLEN', KEYS[1]) > 0 then length = 99"},
	"whoever asks comes first":        {"local before = ahead()", "local before = 0"},
	"deadlines do not count":          {"if micros > tonumber(ARGV[1]) then", "if false then"},
	"a release counts twice":          {"if redis.call('ZREM', KEYS[2], ARGV[5]) == 1 then", "if redis.call('ZREM', KEYS[2], ARGV[5]) then"},
	"silence is held against holders": {"return now - math.max(resumed, lost) > quiet", "return true"},
	"a holder stays in line":          {"  if line > 0 then\n    leave(token)\n", "  if line > 0 then\n"},
	"the queue is never trimmed":      {"if surplus <= 0 then", "if true then"},
	"nothing is refilled":             {"for i = 1, wanted", "for i = 2, wanted"},
	"keys do not expire":              {"grown or left < seconds / 2 or left > seconds", "false"},
	"stale tokens stay":               {"if missing and mayRefill(newcomer) or reclaimable and settled() then", "if missing and mayRefill(newcomer) then"},
}

// brokenScripts are the scripts, with one of the breaks; none for an empty name.
func brokenScripts(t *testing.T, name string) scripts {
	t.Helper()
	found := name == ""
	script := func(source string) *redis.Script {
		source = commonSource + source
		if name != "" && strings.Contains(source, breaks[name][0]) {
			found = true
			source = strings.ReplaceAll(source, breaks[name][0], breaks[name][1])
		}
		return redis.NewScript(scriptKeys, source)
	}
	s := scripts{script(acquireSource), script(maintainSource), script(heartbeatSource), script(releaseSource)}
	if !found {
		t.Fatalf("%s: the scripts have no %q", name, breaks[name][0])
	}
	return s
}

// The model finds scripts that are broken on purpose.
func TestModelFindsBrokenScripts(t *testing.T) {
	for name := range breaks {
		t.Run(name, func(t *testing.T) {
			brokenScripts(t, name)
			c := exec.Command(os.Args[0], "-test.run=^TestModel$", "-rapid.nofailfile", "-rapid.shrinktime=0s", "-rapid.checks=200")
			c.Env = append(os.Environ(), breakVariable+"="+name)
			out, err := c.CombinedOutput()
			if err == nil || !strings.Contains(string(out), "[rapid] failed after") {
				t.Errorf("not found: %v\n%s", err, out)
			}
		})
	}
}
