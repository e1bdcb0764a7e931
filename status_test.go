package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// statusOf runs the mode status in this process.
func statusOf(t *testing.T, s *rig.Redis, stdin string, args ...string) (stdout string, err error) {
	t.Helper()
	var out bytes.Buffer
	args = append([]string{
		"status", "--queue-redis-address=" + rig.QueueAddress(s.Address), "--heartbeat-interval-seconds=30",
	}, args...)
	err = run(t.Context(), args,
		func(string) string { return "" }, strings.NewReader(stdin), &out, t.Output())
	return out.String(), err
}

// wantStatus runs the mode status, which must succeed, and print lines that match the
// patterns in order.
func wantStatus(t *testing.T, s *rig.Redis, args []string, patterns ...string) string {
	t.Helper()
	out, err := statusOf(t, s, "", args...)
	rig.Must(t, err)
	at := 0
	for _, line := range slices.Collect(strings.Lines(out)) {
		if at < len(patterns) && regexp.MustCompile("^"+patterns[at]+"\n$").MatchString(line) {
			at++
		}
	}
	if at < len(patterns) {
		t.Errorf("status %v: no line matches %q in\n%s", args, patterns[at], out)
	}
	return out
}

// shownSemaphore returns a semaphore with two holders, the second stale, and two waiters.
func shownSemaphore(t *testing.T, namespace string) (r *rig.Redis, s *semaphores, id semaphoreID, tokens []string) {
	t.Helper()
	r, s, id = newSemaphore(t)
	id.namespace = namespace
	for i, pod := range []podName{"web-a node-1", "web-b "} {
		token, _, err := s.acquire(t.Context(), id, pod, 2, time.Second)
		rig.Must(t, err)
		r.Do(t, "HSET", id.namesKey(), token+"/pod", fmt.Sprintf("%d %s", r.Now(t)-14400/(i+1), pod))
		tokens = append(tokens, token)
	}
	for _, pod := range []podName{"web-c node-2", ""} {
		token := uuid.NewString()
		a, err := s.runAcquire(t.Context(), id, acquireRequest{token: token, length: 2, arrival: joinLine, pod: pod})
		if err != nil || a.status != acquireFull {
			t.Fatalf("got %+v, %v, want a place in line", a, err)
		}
		tokens = append(tokens, token)
	}
	r.Do(t, "ZADD", id.inflightKey(), "XX", r.Now(t)-7200, tokens[1])
	return r, s, id, tokens
}

func TestStatusTable(t *testing.T) {
	namespace := "status-" + uuid.NewString()[:8]
	r, s, id, _ := shownSemaphore(t, namespace)
	free := semaphoreID{namespace, "free"}
	giveBack(t, s, free, acquire(t, s, free, 3))
	acquire(t, s, semaphoreID{namespace + "-other", "web"}, 1)
	want := []string{
		`NAMESPACE +KEY +LENGTH +FREE +IN USE +STALE +WAITING +LONGEST WAIT +OLDEST HEARTBEAT`,
		namespace + ` +free +3 +3 +0 +0 +0 *`,
		namespace + ` +` + id.key + ` +2 +0 +2 +1 +2 +\d s +2 h ago`,
	}
	wantStatus(t, r, nil, want...)
	out := wantStatus(t, r, []string{namespace}, want...)
	if strings.Contains(out, "-other") || strings.Count(out, "\n") != 3 {
		t.Errorf("namespace %s: got\n%s", namespace, out)
	}
	wantStatus(t, r, []string{"nowhere"}, "no semaphore was used in namespace nowhere in the last minutes")
	if out := wantStatus(t, r, nil); strings.Contains(out, "check-") {
		t.Errorf("the table shows an impossible semaphore:\n%s", out)
	}
}

func TestStatusDetail(t *testing.T) {
	r, _, id, tokens := shownSemaphore(t, "shop")
	wantStatus(t, r, []string{id.String()},
		id.String()+`: 2 of 2 tokens in use \(1 stale\), 0 free, 2 waiting in line`,
		`HOLDER +NODE +HELD +HEARTBEAT +TOKEN`,
		`web-a +node-1 +4 h +\d s ago +`+tokens[0],
		`web-b +\? +2 h +not started yet +stale +`+tokens[1],
		`LINE +WAITER +NODE +WAITS +ASKED +LENGTH +TOKEN`,
		`1st +web-c +node-2 +\d s +\d s ago +2 +`+tokens[2],
		`2nd +\? +\? +\d s +\d s ago +2 +`+tokens[3])
	wantStatus(t, r, []string{"shop/nothing"},
		`shop/nothing: 0 of \? tokens in use \(0 stale\), 0 free, 0 waiting in line`)
}

func TestStatusJSON(t *testing.T) {
	namespace := "status-" + uuid.NewString()[:8]
	r, s, id, tokens := shownSemaphore(t, namespace)
	rig.Must(t, errOf(s.heartbeat(t.Context(), id, uuid.NewString(), "", "web-d node-3", time.Minute)))
	decode := func(v any, args ...string) {
		t.Helper()
		out, err := statusOf(t, r, "", append(args, "-o", "json")...)
		rig.Must(t, err)
		d := json.NewDecoder(strings.NewReader(out))
		d.DisallowUnknownFields()
		rig.Must(t, d.Decode(v))
	}
	var all struct{ Semaphores []map[string]any }
	decode(&all, namespace)
	if len(all.Semaphores) != 1 {
		t.Fatalf("got %v, want one semaphore", all)
	}
	got := all.Semaphores[0]
	for field, want := range map[string]any{
		"namespace": namespace, "key": id.key,
		"length": 2.0, "free": 0.0, "inUse": 3.0, "late": 1.0, "stale": 1.0,
		"waiting": 2.0, "reclaimed": 0.0, "rejoined": 1.0} {
		if got[field] != want {
			t.Errorf("%s is %v, want %v", field, got[field], want)
		}
	}
	if beat := got["oldestHeartbeatSeconds"].(float64); beat < 7200 || beat > 7260 {
		t.Errorf("the oldest heartbeat was %v s ago, want about 7200", beat)
	}
	var one semaphoreReport
	decode(&one, id.String())
	if len(one.Holders) != 3 || len(one.Line) != 2 {
		t.Fatalf("got %+v, want three holders and two waiters", one)
	}
	if h := one.Holders[0]; h.Pod != "web-a" || h.Node != "node-1" || h.Token != tokens[0] ||
		*h.Held < 14400 || h.Heartbeat > 60 || h.Stale {
		t.Errorf("the first holder is %+v", h)
	}
	if h := one.Holders[1]; h.Pod != "web-b" || h.Started || !one.Holders[0].Started {
		t.Errorf("the second holder is %+v", h)
	}
	if h := one.Holders[2]; h.Pod != "web-d" || *h.Held < 60 || *h.Held > 120 {
		t.Errorf("the rejoined holder is %+v", h)
	}
	if l := one.Line[1]; l.Place != 2 || l.Token != tokens[3] || l.Pod != "" || l.Length != 2 {
		t.Errorf("the second in line is %+v", l)
	}
}

func TestStatusRelease(t *testing.T) {
	r, _, id, tokens := shownSemaphore(t, "shop")
	release := func(stdin string, args ...string) (string, error) {
		t.Helper()
		return statusOf(t, r, stdin, append([]string{"release", id.String()}, args...)...)
	}
	for stdin, args := range map[string][]string{"n\n": {tokens[0]}, "": {"web-b"}, "what?\n": {tokens[2]}} {
		if out, err := release(stdin, args...); err == nil || !strings.Contains(out, "Release it? [y/N]") {
			t.Errorf("answer %q: got %v, %s", stdin, err, out)
		}
	}
	r.WantInflight(t, id, tokens[:2]...)
	r.WantLine(t, id, tokens[2:]...)
	out, err := release("", "nobody", "--yes")
	want := `used or waited for by "nobody": see status ` + id.String()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("release of an unknown pod: got %v, %s", err, out)
	}
	for _, c := range []struct{ stdin, what, flag, want string }{
		{"y\n", "web-b", "", "token released"},
		{"", "web-c", "--yes", "taken out of the line"},
		{"YES\n", tokens[0], "", "token released"},
	} {
		args := []string{c.what}
		if c.flag != "" {
			args = append(args, c.flag)
		}
		out, err := release(c.stdin, args...)
		if err != nil || !strings.HasSuffix(out, c.want+"\n") {
			t.Errorf("release of %s: got %v, %s", c.what, err, out)
		}
		if alive := strings.Contains(out, "Its sidecar is alive"); alive != (c.what != "web-b") {
			t.Errorf("release of %s: wrong warning about a live sidecar in\n%s", c.what, out)
		}
	}
	r.WantCounts(t, id, 2, 0)
	r.WantLine(t, id, tokens[3])
}

// Two pods can have one name, for example after a forced deletion in a StatefulSet. Their
// tokens tell them apart.
func TestStatusReleaseOfSameName(t *testing.T) {
	r, s, id := newSemaphore(t)
	for range 2 {
		_, _, err := s.acquire(t.Context(), id, "web-0 node-1", 2, time.Second)
		rig.Must(t, err)
	}
	_, err := statusOf(t, r, "", "release", id.String(), "web-0", "--yes")
	if err == nil || !strings.Contains(err.Error(), "2 tokens of "+id.String()) {
		t.Errorf("got %v, want an error about two tokens", err)
	}
	r.WantCounts(t, id, 0, 2)
}

func TestStatusUsage(t *testing.T) {
	for args, want := range map[string]string{
		"release":                  "release: 0 arguments; they are NAMESPACE/KEY TOKEN|POD",
		"release shop/web":         "release: 1 arguments",
		"release shop web-1":       `"shop" is not a namespace, a slash and a key`,
		"shop/":                    `"shop/" is not a namespace, a slash and a key`,
		"shop web":                 "2 arguments: there may be one, NAMESPACE or NAMESPACE/KEY",
		"-o yaml":                  `-o: "yaml"`,
		"release a/b c --watch":    "--watch and release do not go together",
		"--length=3":               "flag provided but not defined: -length",
		"--redis-addresses=a:6379": "flag provided but not defined",
	} {
		code, _, stderr := runArgs(nil, append([]string{"status"}, strings.Fields(args)...)...)
		if code != 2 || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, %s", args, code, stderr)
		}
	}
	code, stdout, _ := runArgs(map[string]string{"QUEUE_REDIS_ADDRESS": "queue:6379"}, "status", "--help")
	for _, want := range []string{"release NAMESPACE/KEY TOKEN|POD", "(default queue:6379)", "STATUS_REDIS_PASSWORD"} {
		if code != 0 || !strings.Contains(stdout, want) {
			t.Errorf("no %q in\n%s", want, stdout)
		}
	}
}

// In the container of a sidecar, status needs no flags.
func TestStatusInASidecar(t *testing.T) {
	r, _, id, tokens := shownSemaphore(t, "shop")
	sidecar, _ := sidecarContainer(testConfig(r.Address), corev1.ResourceRequirements{}, id, testSpec, tokens[0])
	env := map[string]string{}
	for _, e := range sidecar.Env {
		env[e.Name] = e.Value
	}
	code, stdout, stderr := runArgs(env, "status", id.String())
	if want := id.String() + ": 2 of 2 tokens in use (1 stale)"; code != 0 || !strings.HasPrefix(stdout, want) {
		t.Errorf("exit code %d, %s%s", code, stdout, stderr)
	}
}

// In a container of the webhook, status finds Redis by the webhook's environment. It uses
// a Redis user of its own if there is one.
func TestStatusEnvironment(t *testing.T) {
	env := map[string]string{
		"QUEUE_REDIS_ADDRESS": "queue:6379", "HEARTBEAT_INTERVAL_SECONDS": "5", "STALE_THRESHOLD_SECONDS": "15",
		"REDIS_USERNAME": "webhook", "REDIS_PASSWORD": "a",
	}
	getenv := func(name string) string { return env[name] }
	c, err := parseStatusConfig(nil, getenv)
	rig.Must(t, err)
	if c.queueRedisAddress.text != "queue:6379" || c.heartbeatInterval != 5*time.Second ||
		c.staleThreshold != 15*time.Second || c.redis.username != "webhook" {
		t.Errorf("got %+v", c)
	}
	env["STATUS_REDIS_USERNAME"] = "status" // without a password, as if the Secret had none
	if c, err = parseStatusConfig(nil, getenv); err != nil || c.redis.username != "webhook" {
		t.Errorf("got %+v, %v", c.redis, err)
	}
	env["STATUS_REDIS_PASSWORD"] = "b"
	c, err = parseStatusConfig([]string{"--queue-redis-address=other:6379"}, getenv)
	if err != nil || c.redis.username != "status" || c.redis.password != "b" ||
		c.queueRedisAddress.text != "other:6379" {
		t.Errorf("got %+v, %v", c, err)
	}
	env["STATUS_REDIS_PASSWORD_FILE"] = rig.WriteFile(t, "password", "c\n")
	const want = "--redis-password-file: a password is in the environment, too: set one of them"
	if _, err = parseStatusConfig(nil, getenv); err == nil || err.Error() != want {
		t.Errorf("with two passwords: got %v, want %s", err, want)
	}
	env["STATUS_REDIS_PASSWORD"] = ""
	c, err = parseStatusConfig(nil, getenv)
	if want := (redisSettings{username: "status", passwordFile: env["STATUS_REDIS_PASSWORD_FILE"]}); err != nil ||
		c.redis != want {
		t.Errorf("got %+v, %v", c.redis, err)
	}
}

// Text that another client wrote into Redis cannot control the terminal of status.
func TestStatusEscapesStoredText(t *testing.T) {
	r, s, id := newSemaphore(t)
	namespace := "status-" + uuid.NewString()[:8]
	strange := semaphoreID{namespace, "\x1b[2Jkey"}
	acquire(t, s, strange, 1)
	wantStatus(t, r, []string{namespace}, namespace+` +"\\x1b\[2Jkey" +1 .*`)
	token := acquire(t, s, id, 2)
	r.Do(t, "HSET", id.namesKey(), token+"/pod", "1 \x1b[2J node")
	r.Do(t, "ZADD", id.inflightKey(), r.Now(t), "\x1b[2J")
	r.Do(t, "HSET", id.namesKey(), "\x1b[2J/pod", "what\nis this")
	if out := wantStatus(t, r, []string{id.String()}, `\? +\? +\? +.* ago +`+token); strings.Contains(out, "\x1b") {
		t.Errorf("status prints an escape sequence: %q", out)
	}
}

// With --watch, status repeats until it is terminated.
func TestStatusWatch(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 2)
	p := rig.StartProgram(t, "status", "--queue-redis-address="+rig.QueueAddress(r.Address),
		"--watch", "-o", "json", id.String())
	wantInUse := func(n int) {
		t.Helper()
		rig.Eventually(t, 10*time.Second, func() error {
			if !strings.Contains(p.Stdout.String(), fmt.Sprintf(`"inUse":%d,`, n)) {
				return fmt.Errorf("no report of %d tokens in use: %s", n, p.Stdout.String())
			}
			return nil
		})
	}
	wantInUse(1)
	acquire(t, s, id, 2)
	wantInUse(2)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
}

// A survey is quick in a Redis with many other keys, and times out if Redis hangs.
func TestSurveyIsBounded(t *testing.T) {
	t.Parallel()
	r, s, _ := newSemaphoreOn(t, rig.StartRedis(t))
	const semaphores = 2000
	concurrently(semaphores, func(i int) {
		id := semaphoreID{fmt.Sprintf("ns-%d", i%10), fmt.Sprintf("key-%d", i)}
		maintain(t, s, id, 3) // without a lock
		acquire(t, s, id, 3)
	})
	for i := range 200 {
		var args []any
		for j := range 100 {
			args = append(args, fmt.Sprintf("other-%d-%d", i, j), "x")
		}
		if rig.TestQueue != rig.ClusterQueue { // a Cluster refuses keys of several slots
			r.Do(t, "MSET", args...)
		}
	}
	before := r.CommandCalls(t)
	start := time.Now()
	states, err := s.survey(t.Context(), "")
	took := time.Since(start)
	if err != nil || len(states) != semaphores {
		t.Fatalf("found %d semaphores, %v", len(states), err)
	}
	t.Logf("%d semaphores in %s", len(states), took)
	calls := r.CommandCalls(t)
	if n := calls["scan"] - before["scan"]; n < 5 || n > 60 {
		t.Errorf("%d calls of SCAN", n)
	}
	if states, err = s.survey(t.Context(), "ns-3"); err != nil || len(states) != semaphores/10 {
		t.Errorf("found %d semaphores of a namespace, %v", len(states), err)
	}
	r.Pause(t)
	defer r.Resume(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start = time.Now()
	if _, err := s.survey(ctx, ""); err == nil {
		t.Error("a survey of a Redis that hangs succeeded")
	}
	rig.WantWithin(t, time.Since(start), 2*time.Second, "a survey of a Redis that hangs")
}

// The user of status can inspect and release, but not acquire. It needs each of its ACL
// rules.
func TestStatusUser(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	admin := testSemaphores(t, r.Address)
	config := testConfig(r.Address)
	config.redis = redisSettings{username: "status", password: rig.Password}
	s := semaphoresOf(t, config)
	look := func() error {
		id := freshID()
		acquire(t, admin, id, 1)
		standInLine(t, r, admin, id, false)
		return errors.Join(errOf(s.survey(t.Context(), "")), errOf(s.inspect(t.Context(), id)))
	}
	release := func() error {
		id := freshID()
		token := acquire(t, admin, id, 2)
		standInLine(t, r, admin, id, false)
		r.Do(t, "ZADD", id.waitersKey(), 1, "gone")
		r.Do(t, "ZADD", id.seenKey(), 1, "gone")
		// The queue has more free tokens than the length allows: first some are trimmed,
		// then all.
		for _, length := range []int{2, 1} {
			r.Do(t, "RPUSH", id.queueKey(), "free", "free", "free")
			r.Do(t, "HSET", id.stateKey(), "length", length)
			r.Do(t, "PERSIST", id.stateKey())
			if _, err := s.release(t.Context(), id, token, ""); err != nil {
				return err
			}
			token = uuid.NewString()
			r.Do(t, "ZADD", id.inflightKey(), r.Now(t), token, r.Now(t), "another")
		}
		return nil
	}
	rules := rig.Anys(strings.Fields(statusACL))
	r.Do(t, "ACL", append([]any{"SETUSER", "status", "on", ">" + rig.Password}, rules...)...)
	if rig.TestQueue != "" {
		r.Do(t, "ACL", "SETUSER", "status", "+role", "+cluster|slots")
	}
	rig.Must(t, look())
	if err := release(); err == nil || !isDenied(err) {
		t.Errorf("release without the rules for it: got %v, want NOPERM", err)
	}
	wantNeeded := func(rules string, do func() error) {
		t.Helper()
		for rule := range strings.FieldsSeq(rules) {
			command, isCommand := strings.CutPrefix(rule, "+")
			if !isCommand {
				continue
			}
			r.Do(t, "ACL", "SETUSER", "status", "-"+command)
			r.Do(t, "ACL", "LOG", "RESET")
			err := do()
			if denied, _ := redis.Values(r.Do(t, "ACL", "LOG"), nil); err == nil && len(denied) > 0 {
				err = errors.New("NOPERM in the ACL log, though the command succeeded by other means")
			}
			if err == nil || !isDenied(err) {
				t.Errorf("without %s: got %v, want NOPERM", rule, err)
			}
			r.Do(t, "ACL", "SETUSER", "status", rule)
		}
		rig.Must(t, do())
	}
	wantNeeded(statusACL, look)
	r.Do(t, "ACL", append([]any{"SETUSER", "status"}, rig.Anys(strings.Fields(releaseACL))...)...)
	wantNeeded(releaseACL, release)
	id := freshID()
	maintain(t, admin, id, 1)
	if _, _, err := s.acquire(t.Context(), id, "", 1, time.Second); err == nil || !isDenied(err) {
		t.Errorf("acquire: got %v, want NOPERM", err)
	}
	r.WantCounts(t, id, 1, 0)
}
