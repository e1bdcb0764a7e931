package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
)

func TestSidecarGivesBackOnSignal(t *testing.T) {
	t.Parallel()
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		r, s, id := newSemaphore(t)
		p := startSidecar(t, r.address, id, acquire(t, s, id, 2))
		p.wantLog(t, "holding the token")
		r.wantCounts(t, id, 1, 1)
		p.signal(t, signal)
		p.wantExit(t, 0)
		r.wantCounts(t, id, 2, 0)
		p.wantLog(t, "token given back")
	}
}

func TestSidecarBeats(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := acquire(t, s, id, 1)
	startSidecar(t, r.address, id, token)
	for range 3 { // at once, and again after each interval
		r.makeStale(t, id, token)
		eventually(t, 20*time.Second, func() error {
			score := r.do(t, "ZSCORE", id.inflightKey(), token)
			if string(score.([]byte)) == "1" {
				return fmt.Errorf("no heartbeat")
			}
			return nil
		})
	}
}

// A sidecar that was paused past the threshold touches neither the token that its successor got, nor lets anybody
// in before the count is below length again.
func TestPausedSidecar(t *testing.T) {
	t.Parallel()
	r := commonRedis(t)
	w := startWebhook(t, testConfig(r.address))
	id := freshID()
	first := w.wantAdmitted(t, id, 1)
	p := startSidecar(t, r.address, id, first)
	p.wantLog(t, "holding the token")
	p.signal(t, syscall.SIGSTOP)
	waitState(t, p.Process.Pid, "T")
	r.makeStale(t, id, first)
	second := w.wantAdmitted(t, id, 1)
	r.wantCounts(t, id, 0, 1)

	p.signal(t, syscall.SIGCONT)
	p.wantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	r.wantCounts(t, id, 0, 2)
	w.wantFull(t, id, 1, 2)

	p.signal(t, syscall.SIGTERM)
	p.wantExit(t, 0)
	w.wantFull(t, id, 1, 1)
	r.wantCounts(t, id, 0, 1)
	r.wantInflight(t, id, second)
	w.semaphores.giveBack(id, second)
	w.wantAdmitted(t, id, 1)
}

// A Redis that is emptied under live sidecars counts them again within an interval.
func TestRedisEmptied(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	w := startWebhook(t, testConfig(r.address))
	id := freshID()
	var tokens []string
	for range 3 {
		token := w.wantAdmitted(t, id, 3)
		startSidecar(t, r.address, id, token).wantLog(t, "holding the token")
		tokens = append(tokens, token)
	}
	r.do(t, "FLUSHALL")
	r.wantCounts(t, id, 0, 3)
	w.wantFull(t, id, 3, 3)
	got := r.inflight(t, id)
	slices.Sort(got)
	slices.Sort(tokens)
	if !slices.Equal(got, tokens) {
		t.Errorf("in flight %v, want %v", got, tokens)
	}

	// Refilled before the sidecars are back, they take the free tokens.
	r.do(t, "FLUSHALL")
	maintain(t, w.semaphores, id, 3)
	r.wantCounts(t, id, 0, 3)
}

// A Redis that is out of reach ends no sidecar: not at its start, not later, and SIGTERM is answered when it is back.
func TestSidecarOutlivesRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, startRedis(t))
	token := acquire(t, s, id, 1)
	r.stop()
	p := startSidecar(t, r.address, id, token, "--termination-grace-period-seconds=60")
	p.wantLog(t, "heartbeat failed, to be retried")
	must(t, r.start())
	p.wantLog(t, "heartbeat succeeds again")
	r.stop()
	p.signal(t, syscall.SIGTERM)
	p.wantLog(t, "giving the token back")
	p.wantLog(t, "release failed, to be retried")
	p.signal(t, syscall.SIGTERM) // once is enough: it goes on trying
	must(t, r.start())
	p.wantExit(t, 0)
	r.wantCounts(t, id, 1, 0)
}

func TestSidecarThatCannotGiveBack(t *testing.T) {
	t.Parallel()
	address := freeAddress(t)
	token := uuid.NewString()
	p := startSidecar(t, address, semaphoreID{"shop", "web"}, token, "--termination-grace-period-seconds=1")
	p.wantLog(t, "heartbeat failed, to be retried")
	p.signal(t, syscall.SIGTERM)
	p.wantExit(t, 1)
	line := p.wantLog(t, "failed")
	want := "token " + token + " of shop/web not given back within the grace period, it will be reclaimed 2m0s after its last heartbeat: release shop/web: " + unreachedText(address)
	if got := line["error"].(string); !strings.HasPrefix(got, want) {
		t.Errorf("logged %q, want %q", got, want)
	}
}

// A server that has become a read-only replica is left for whoever is behind the address now.
func TestRefusingServerIsDropped(t *testing.T) {
	if testQueue == clusterTests {
		t.Skip("a Cluster's replica sends us to its master")
	}
	r, s, id := newSemaphoreOn(t, startRedis(t))
	token := acquire(t, s, id, 1)
	pool := serverOf(t, s, id).pool
	r.do(t, "REPLICAOF", "127.0.0.1", portOf(freeAddress(t)))
	for range 3 {
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		if _, err := s.heartbeat(ctx, id, token, "", 0); err == nil || !strings.Contains(err.Error(), "READONLY") && !strings.Contains(err.Error(), "is not a primary") {
			t.Errorf("got %v, want READONLY", err)
		}
		cancel()
		if n := pool.ActiveCount(); n != 0 {
			t.Errorf("%d connections to the read-only server are kept", n)
		}
	}
	r.do(t, "REPLICAOF", "NO", "ONE")
	_, err := s.heartbeat(context.Background(), id, token, "", 0)
	must(t, err)
}

// One connection is all that a sidecar needs.
func TestSidecarUsesOneConnection(t *testing.T) {
	r := startRedis(t)
	id := freshID()
	sidecarSemaphores := newSemaphores(testConfig(r.address).sharedConfig, nil, 1, slog.New(slog.DiscardHandler))
	defer sidecarSemaphores.queue.close()
	s := &sidecar{semaphores: sidecarSemaphores, id: id, token: uuid.NewString(), interval: time.Second, grace: context.Background(), log: slog.New(slog.DiscardHandler)}
	for range 10 {
		must(t, s.beat(context.Background()))
	}
	must(t, s.giveBack(true))
	clients := string(r.do(t, "CLIENT", "LIST").([]byte))
	if n := strings.Count(clients, "\n") - strings.Count(clients, " name=sentinel-"); n != 2 { // one is the test's
		t.Errorf("connections:\n%s", clients)
	}
}
