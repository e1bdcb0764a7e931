package failover

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The primary of a Sentinel group is killed, hangs, or is replaced by hand.
func TestSentinelFailover(t *testing.T) {
	for name, c := range map[string]struct {
		bound  time.Duration
		set    []string
		strike func(t *testing.T, g *rig.SentinelGroup, old *rig.Redis)
		repair func(t *testing.T, old *rig.Redis)
	}{
		"killed": {rig.DownAfter + 3*time.Second, nil,
			func(t *testing.T, _ *rig.SentinelGroup, old *rig.Redis) { old.Crash(t) },
			func(t *testing.T, old *rig.Redis) { rig.Must(t, old.Start()) }},
		"stopped": {rig.DownAfter + 3*time.Second, nil,
			func(t *testing.T, _ *rig.SentinelGroup, old *rig.Redis) { old.Pause(t) },
			func(t *testing.T, old *rig.Redis) { old.Resume(t) }},
		// The old primary stays one for some seconds, but has no replicas.
		"by hand": {2 * time.Second, []string{"--min-replicas-to-write", "1"},
			func(t *testing.T, g *rig.SentinelGroup, _ *rig.Redis) {
				g.Sentinels[1].Do(t, "SENTINEL", "FAILOVER", "tokens")
			},
			func(*testing.T, *rig.Redis) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := rig.StartSentinelGroupWith(t, rig.GroupOptions{Args: c.set, Bare: true})
			f := startTraffic(t, g, rig.FreshID())
			old := g.Servers[0]
			f.strike(t, func() { c.strike(t, g, old) })
			f.wantRecovered(t, f.recoveredBy(t, c.bound, func() bool { return g.Serves(t, old, f.held) }))

			// The old primary returns as a replica, and no token is doubled.
			c.repair(t, old)
			g.WantReady(t, 2)
			primary := g.Primary(t)
			if primary == old {
				t.Error("the old primary is primary again")
			}
			primary.WantCounts(t, f.held, 0, holderCount)
			reply, err := primary.Run("heartbeat", f.held, f.timing, f.holders[0], "", 0)
			if err != nil || reply.Status == rig.HeartbeatRejoined {
				t.Errorf("a heartbeat after the failover: %+v, %v", reply, err)
			}
			if n, ok := f.webhook.Metric(t, "at_least_semaphore_failovers_total"); !ok || n < 1 {
				t.Errorf("the metric counts %v failovers", n)
			}
		})
	}
}

// A primary without replicas refuses writes, and the webhook is not ready. When the
// replicas are back, the webhook is ready again.
func TestPrimaryWithoutReplicas(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t, "--min-replicas-to-write", "1", "--min-replicas-max-lag", "1")
	w := newInstallation(t, g.Address(), slowTiming).startWebhook(t)
	id := rig.FreshID()
	token := w.WantAdmitted(t, id, 2)
	primary := g.Primary(t)
	for _, r := range g.Servers[1:] {
		r.Pause(t)
	}
	rig.Eventually(t, patience, func() error {
		response, err := http.Get(w.HealthURL + "/readyz")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode == http.StatusOK || !strings.Contains(string(text), "NOREPLICAS") {
			return fmt.Errorf("got %s %s, %v, want NOREPLICAS", response.Status, text, err)
		}
		return nil
	})
	for _, r := range g.Servers[1:] {
		r.Resume(t)
	}
	w.WantAdmitted(t, id, 2) // waits until the primary accepts writes
	if g.Holder(t, id) != primary {
		t.Error("another server is primary")
	}
	if !slices.Contains(primary.Inflight(t, id), token) {
		t.Error("the token is gone")
	}
}

const noSentinelText = "no Sentinel answers, going on with the primary that is known"

// Two of three Sentinels are gone, then all. The webhook keeps using the last primary,
// and logs that.
func TestSentinelsGone(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	i := newInstallation(t, g.Address(), slowTiming)
	w := i.startWebhook(t)
	id := rig.FreshID()
	w.WantAdmitted(t, id, rig.MaxLength)
	g.Sentinels[0].Crash(t)
	g.Sentinels[1].Crash(t)
	i.startWebhook(t).WantAdmitted(t, id, rig.MaxLength)
	if len(w.Log.Lines(t, noSentinelText)) != 0 {
		t.Error("the webhook logged that no Sentinel answers, and one does")
	}
	g.Sentinels[2].Crash(t)
	rig.Eventually(t, patience, func() error {
		w.WantAdmitted(t, id, rig.MaxLength)
		if len(w.Log.Lines(t, noSentinelText)) == 0 {
			return errors.New("the webhook does not log that no Sentinel answers")
		}
		return nil
	})
	// After an outage, the webhook finds the primary again, though no Sentinel answers.
	g.Servers[0].Crash(t)
	back := make(chan error, 1)
	time.AfterFunc(time.Second, func() { back <- g.Servers[0].Start() })
	w.WantAdmitted(t, id, rig.MaxLength)
	rig.Must(t, <-back)
	wantOnceAMinute(t, w.Log.Lines(t, noSentinelText))
}

// wantOnceAMinute fails the test if two lines of a log are less than a minute apart.
func wantOnceAMinute(t *testing.T, lines []map[string]any) {
	t.Helper()
	var before time.Time
	for _, line := range lines {
		at, err := time.Parse(time.RFC3339Nano, line["time"].(string))
		rig.Must(t, err)
		if at.Sub(before) < time.Minute-time.Second {
			t.Errorf("logged %v, %s after the line before", line, at.Sub(before))
		}
		before = at
	}
}

// A Sentinel that was cut off, or belongs to an older group, reports a former primary.
// The webhook does not go back there when no other Sentinel answers.
func TestOutdatedSentinel(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	past := rig.StartSentinel(t)
	past.Do(t, "SENTINEL", "MONITOR", "tokens", "127.0.0.1", rig.Port(rig.StartRedis(t).Address), 1)
	g.Sentinels[0].Do(t, "SENTINEL", "FAILOVER", "tokens")
	g.WantReady(t, 2)
	address := strings.Replace(g.Address(), "//", "//"+past.Address+",", 1)
	w := newInstallation(t, address, slowTiming).startWebhook(t)
	id := rig.FreshID()
	token := w.WantAdmitted(t, id, rig.MaxLength)
	primary := g.Primary(t)
	primary.WantInflight(t, id, token)
	for _, s := range g.Sentinels {
		s.Crash(t)
	}
	received := regexp.MustCompile(`total_connections_received:(\d+)`)
	rig.Eventually(t, patience, func() error { // the webhook keeps asking all Sentinels
		info, err := redis.String(past.Control.Do("INFO", "stats"))
		if n := received.FindStringSubmatch(info)[1]; err != nil || len(n) < 2 {
			w.WantAdmitted(t, id, rig.MaxLength)
			return fmt.Errorf("it was asked %s times, %v", n, err)
		}
		return nil
	})
	w.WantAdmitted(t, id, rig.MaxLength)
	if _, inflight, err := primary.Counts(id); err != nil || inflight < 2 {
		t.Errorf("%d in flight at the primary, %v", inflight, err)
	}
	if lines := w.Log.Lines(t, "the queue has another primary"); len(lines) != 0 {
		t.Errorf("logged %v", lines)
	}
}

// An error names the problem with the address or with the password of the Sentinels.
func TestSentinelErrors(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	sentinel := g.Sentinels[0]
	for name, c := range map[string]struct{ address, want string }{
		"no such name":    {"redis+sentinel://" + sentinel.Address + "/other", "No such master with that name"},
		"nothing listens": {"redis+sentinel://" + rig.FreeAddress(t) + "/tokens", "connection refused"},
		"no Sentinel":     {"redis+sentinel://" + g.Servers[0].Address + "/tokens", "unknown command"},
	} {
		w := newInstallation(t, c.address, slowTiming).newWebhook(t)
		wantFailed(t, name, w, c.want)
	}
	sentinel.Do(t, "ACL", "SETUSER", "default", "resetpass", ">"+rig.Password)
	i := newInstallation(t, "redis+sentinel://"+sentinel.Address+"/tokens", slowTiming)
	right, wrong := i.newWebhook(t, "--sidecar-redis-secret=redis"), i.newWebhook(t, "--sidecar-redis-secret=redis")
	setEnv(right.Process, "REDIS_SENTINEL_PASSWORD="+rig.Password)
	right.Begin(t)
	right.WantAdmitted(t, rig.FreshID(), 1)
	setEnv(wrong.Process, "REDIS_SENTINEL_PASSWORD=wrong")
	wantFailed(t, "with a wrong password", wrong, "WRONGPASS")
}

// wantFailed starts a webhook whose admissions must fail with a text.
func wantFailed(t *testing.T, name string, w *rig.Webhook, want string) {
	t.Helper()
	w.Start(t)
	w.WantLog(t, "serving")
	status, text, err := ask(w, rig.Review(t, rig.FreshID(), 1), 3*time.Second)
	if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, want) {
		t.Errorf("%s: answered %d %q, %v, want %q", name, status, text, err, want)
	}
}

// The users of a Sentinel group need the rules in docs/security.md.
func TestSentinelUsers(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	setUser := func(servers []*rig.Redis, args ...string) {
		for _, s := range servers {
			s.Do(t, "ACL", rig.Anys(append([]string{"SETUSER"}, args...))...)
		}
	}
	password := []string{"on", ">" + rig.Password}
	rules := strings.Fields(rig.SidecarACL + " " + rig.SentinelACL)
	setUser(g.Servers, slices.Concat([]string{"sidecar"}, password, rules)...)
	setUser(g.Sentinels, slices.Concat([]string{"hook"}, password, strings.Fields(rig.OnSentinelsACL))...)
	i := newInstallation(t, g.Address(), slowTiming)
	start := func() *rig.Process {
		s := i.newSidecar(t, rig.FreshID(), uuid.NewString())
		setEnv(s, "REDIS_USERNAME=sidecar", "REDIS_PASSWORD="+rig.Password,
			"REDIS_SENTINEL_USERNAME=hook", "REDIS_SENTINEL_PASSWORD="+rig.Password)
		s.Start(t)
		return s
	}
	// Redis lacks the token: the first heartbeat counts it.
	const counted = "the token was not in flight (reclaimed as stale, or lost with Redis): counted again"
	start().WantLog(t, counted)
	for _, c := range []struct {
		user, rules string
		servers     []*rig.Redis
	}{{"sidecar", rig.SentinelACL, g.Servers}, {"hook", rig.OnSentinelsACL, g.Sentinels}} {
		for _, rule := range strings.Fields(c.rules) {
			setUser(c.servers, c.user, "-"+rule[1:])
			var s *rig.Process
			rig.Eventually(t, time.Minute, func() error { // on a loaded machine, a look-up may take too long
				s = start()
				line := s.WantLog(t, "heartbeat failed, to be retried")
				if text := fmt.Sprint(line["error"]); !strings.Contains(text, "NOPERM") {
					return fmt.Errorf("without %s: %s", rule, text)
				}
				return nil
			})
			setUser(c.servers, c.user, rule)
			s.WantLog(t, counted)
		}
	}
}
