package failover

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	holderCount = 20
	waiterCount = 10

	// The timeouts of the API servers. No admission with the long one may fail.
	longTimeout  = 20 * time.Second
	shortTimeout = time.Second

	admissionsEvery = time.Second / 50
	calmAdmissions  = 50 // before the fault
)

// admission is one admission of the traffic, and its answer.
type admission struct {
	id      rig.ID
	isShort bool          // it has shortTimeout
	start   time.Duration // since the fault; negative: it began before
	took    time.Duration
	token   string
	err     error // nil: the pod got the token
}

// traffic is the load while servers fail. It sends fifty admissions a second. Every second
// one of the first id has a short timeout. It also runs sidecars of holders, and sidecars
// that wait in line.
type traffic struct {
	*installation
	group   rig.Group
	webhook *rig.Webhook
	ids     []rig.ID // of the admissions
	held    rig.ID   // of the holders
	line    rig.ID   // of the waiters
	bodies  map[rig.ID][]byte

	holders    []string // tokens
	lineHolder string
	waiters    []string
	got        chan string             // the waiters' tokens, in the order of their hand-overs
	sidecars   map[string]*rig.Process // by token

	stop func() // ends the admissions

	mu    sync.Mutex // guards the fields below; only strike sets fault
	fault time.Time  // zero before the fault
	done  []admission
}

// startTraffic starts the traffic. Holders and waiters use the server of the first id.
func startTraffic(t *testing.T, g rig.Group, ids ...rig.ID) *traffic {
	t.Helper()
	f := &traffic{
		installation: newInstallation(t, g.Address(), slowTiming),
		group:        g,
		ids:          ids,
		held:         sameServer(t, g, ids[0]),
		line:         sameServer(t, g, ids[0]),
		bodies:       map[rig.ID][]byte{},
		got:          make(chan string, waiterCount),
		sidecars:     map[string]*rig.Process{},
	}
	f.webhook = f.startWebhook(t)
	for range holderCount {
		f.holders = append(f.holders, f.startHolder(t, f.held, holderCount))
	}
	f.lineHolder = f.startHolder(t, f.line, 1)
	for range waiterCount {
		token := uuid.NewString()
		w := f.newWaitingSidecar(t, f.line, token, 1)
		w.OnLine = func(line string) {
			if strings.Contains(line, `"msg":"`+rig.HeldText+`"`) {
				f.got <- token
			}
		}
		w.Start(t)
		f.sidecars[token] = w
		f.waiters = append(f.waiters, token)
		g.Holder(t, f.line).WantLine(t, f.line, f.waiters...)
	}
	f.startAdmissions(t)
	return f
}

// startHolder starts the sidecar of a pod, which the webhook admits with a token.
func (f *traffic) startHolder(t *testing.T, id rig.ID, length int) (token string) {
	t.Helper()
	token = f.webhook.WantAdmitted(t, id, length)
	f.sidecars[token] = f.newSidecar(t, id, token)
	f.sidecars[token].Start(t)
	return token
}

// sameServer returns a new semaphore on the server of another one.
func sameServer(t *testing.T, g rig.Group, id rig.ID) rig.ID {
	t.Helper()
	for {
		if fresh := rig.FreshID(); g.Holder(t, fresh) == g.Holder(t, id) {
			return fresh
		}
	}
}

// startAdmissions sends admissions until stop is called. stop waits for the last answer.
func (f *traffic) startAdmissions(t *testing.T) {
	t.Helper()
	for _, id := range f.ids {
		f.bodies[id] = rig.Review(t, id, rig.MaxLength)
	}
	end, ended := make(chan struct{}), make(chan struct{})
	f.stop = sync.OnceFunc(func() {
		close(end)
		<-ended
	})
	t.Cleanup(f.stop)
	go func() {
		defer close(ended)
		var all sync.WaitGroup
		defer all.Wait()
		ticks := time.NewTicker(admissionsEvery)
		defer ticks.Stop()
		for n := 0; ; n++ {
			select {
			case <-end:
				return
			case <-ticks.C:
			}
			all.Go(func() { f.admit(n) })
		}
	}()
}

// admit sends the n-th admission, and records its answer.
func (f *traffic) admit(n int) {
	a := admission{id: f.ids[n%len(f.ids)], isShort: n%(2*len(f.ids)) == 0}
	timeout := longTimeout
	if a.isShort {
		timeout = shortTimeout
	}
	start := time.Now()
	status, text, err := ask(f.webhook, f.bodies[a.id], timeout)
	a.took = time.Since(start)
	if err == nil {
		var answer rig.Admission
		answer, err = rig.ReadAdmission(status, text)
		if a.token = answer.Token; err == nil && a.token == "" {
			err = fmt.Errorf("refused: %d %s", answer.Code, answer.Message)
		}
	}
	a.err = err
	f.mu.Lock()
	defer f.mu.Unlock()
	a.start = start.Sub(f.fault)
	if f.fault.IsZero() {
		a.start = -1
	}
	f.done = append(f.done, a)
}

// strike waits for some admissions at rest, then makes the servers fail.
func (f *traffic) strike(t *testing.T, fault func()) {
	t.Helper()
	rig.Eventually(t, patience, func() error {
		if n := len(f.since(-1)); n < calmAdmissions {
			return fmt.Errorf("%d admissions before the fault", n)
		}
		return nil
	})
	f.mu.Lock()
	f.fault = time.Now()
	f.mu.Unlock()
	fault()
}

// since returns the admissions that began at least that long after the fault.
func (f *traffic) since(after time.Duration) (all []admission) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.done {
		if a.start >= after {
			all = append(all, a)
		}
	}
	return all
}

// recoveredBy waits until the servers have failed over. It returns the time after the
// fault by which the queue must work again. That is three seconds after the servers,
// which need longer on a busy machine. An attempt that the old server does not answer
// takes two of them.
func (f *traffic) recoveredBy(t *testing.T, bound time.Duration, servesYet func() bool) time.Duration {
	t.Helper()
	rig.Eventually(t, patience, func() error {
		if servesYet() {
			return errors.New("the servers have not failed over")
		}
		return nil
	})
	took := time.Since(f.fault)
	t.Logf("the servers failed over within %.1f s", took.Seconds())
	return max(bound, took+3*time.Second)
}

// wantRecovered waits until the queue works again, and for some seconds more. It fails
// the test if an admission with a long timeout failed. "make test-timing" also fails it if
// one took longer than bound or failed later than that after the fault, or one on
// unaffected servers took a second.
// The new server may miss the last tokens of the old one: their holders' heartbeats count
// them again. Then all tokens add up, and the line continues in its order.
func (f *traffic) wantRecovered(t *testing.T, bound time.Duration, unaffected ...rig.ID) {
	t.Helper()
	rig.Eventually(t, bound+patience, func() error {
		if n := len(f.since(bound + 2*time.Second)); n < 20 {
			return fmt.Errorf("%d admissions since the queue has to work again", n)
		}
		return nil
	})
	f.stop()
	all := f.since(0)
	var slowest, slowestUnaffected, lastFailed time.Duration
	failed := 0
	for _, a := range all {
		if slices.Contains(unaffected, a.id) {
			slowestUnaffected = max(slowestUnaffected, a.took)
		} else {
			slowest = max(slowest, a.took)
		}
		if a.err == nil {
			continue
		}
		failed++
		lastFailed = max(lastFailed, a.start+a.took)
		if !a.isShort {
			t.Errorf("%s after the fault, an admission failed after %s: %v", a.start, a.took, a.err)
		}
	}
	t.Logf("of %d admissions %d failed", len(all), failed)
	rig.WantWithin(t, slowest, bound, "the slowest admission")
	rig.WantWithin(t, lastFailed, bound, "from the fault to the last failed admission, it")
	rig.WantWithin(t, slowestUnaffected, time.Second, "the slowest admission on unaffected servers")
	f.wantHoldersBack(t)
	f.wantCounted(t)
	f.wantLineGoesOn(t)
}

// wantHoldersBack waits until exactly the holders are in flight: their heartbeats restore
// them.
func (f *traffic) wantHoldersBack(t *testing.T) {
	t.Helper()
	holder := f.group.Holder(t, f.held)
	want := slices.Sorted(slices.Values(f.holders))
	start := time.Now()
	rig.Eventually(t, patience, func() error {
		got := slices.Sorted(slices.Values(holder.Inflight(t, f.held)))
		if !slices.Equal(got, want) {
			return fmt.Errorf("in flight are %v, want %v", got, want)
		}
		return nil
	})
	t.Logf("all holders are in flight %.1f s after the end of the admissions", time.Since(start).Seconds())
	holder.WantCounts(t, f.held, 0, holderCount)
}

// wantCounted checks the tokens of the admissions. The new server may lack those of the
// last moment before the failover. A heartbeat of their pods' sidecars counts them again.
// Tokens of failed admissions must be given back.
func (f *traffic) wantCounted(t *testing.T) {
	t.Helper()
	lost := 0
	for _, id := range f.ids {
		server := f.group.Holder(t, id)
		inflight := map[string]bool{}
		for _, token := range server.Inflight(t, id) {
			inflight[token] = true
		}
		var granted []string
		for _, a := range f.done { // the admissions have ended
			if a.id == id && a.err == nil {
				granted = append(granted, a.token)
			}
		}
		for _, token := range granted {
			if inflight[token] {
				continue
			}
			lost++
			if _, err := server.Run("heartbeat", id, f.timing, token, "", 0); err != nil {
				t.Error(err)
			}
		}
		slices.Sort(granted)
		rig.Eventually(t, patience, func() error {
			got := slices.Sorted(slices.Values(server.Inflight(t, id)))
			if !slices.Equal(got, granted) {
				return fmt.Errorf("%s: %d in flight are not the %d that were handed out", id, len(got), len(granted))
			}
			return nil
		})
		if free, _, err := server.Counts(id); err != nil || free+len(granted) > rig.MaxLength {
			t.Errorf("%s: %d free, %d in use, %v", id, free, len(granted), err)
		}
	}
	t.Logf("the new server did not know %d tokens, and counted them again", lost)
}

// wantLineGoesOn gives back the token that the line waits for, then those of the next
// waiters. They must get it in the order of the line.
func (f *traffic) wantLineGoesOn(t *testing.T) {
	t.Helper()
	f.group.Holder(t, f.line).WantLine(t, f.line, f.waiters...)
	last := f.lineHolder
	for i, want := range f.waiters[:3] {
		start := time.Now()
		f.release(t, last)
		select {
		case got := <-f.got:
			if got != want {
				t.Fatalf("number %d of the line got the token, want number %d", slices.Index(f.waiters, got)+1, i+1)
			}
			last = got
		case <-time.After(patience):
			t.Fatal("the line does not move")
		}
		// Redis calls the waiter. A waiter that is still subscribed to the old server
		// learns of it when it asks again, at most four seconds later.
		t.Logf("number %d of the line had the token after %.1f s", i+1, time.Since(start).Seconds())
	}
}

// release ends a holder's sidecar, which gives the token back.
func (f *traffic) release(t *testing.T, token string) {
	t.Helper()
	s := f.sidecars[token]
	s.Signal(t, syscall.SIGTERM)
	s.WantExit(t, 0)
}
