//go:build upgrade

package main

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// The tests of this tag ("make test-upgrade") run the program of before beside this one, as processes, while pods come and go: webhooks and
// sidecars of both, one Redis with the users of deploy/, three lock servers. "Before" is the last release. Until there is one, it is HEAD:
// then both programs are the same but for what is not committed.

const (
	upgradeStage   = 5 * time.Second // at the least, between two changes
	upgradeWorkers = 16              // pods that come and go at any time
)

// upgradeKinds are what the pods of this test say of themselves by the annotation when-full.
var upgradeKinds = []string{whenFullDeny, whenFullWait}

// usersOfBeforeDo says whether this program works with the users that the deploy/ of the last release has made. If it cannot, the changelog
// names the new rules.
const usersOfBeforeDo = true

// programBefore builds the program of before. It returns it with the folder of its files, and whether it was released.
func programBefore(t *testing.T) (b programBuild, folder string, released bool) {
	t.Helper()
	commit, released, err := commitBefore()
	must(t, err)
	t.Logf("the program of before is that of %s", commit)
	folder = t.TempDir()
	must(t, export(commit, folder))
	b = programBuild{"example.org/sidecar:before", filepath.Join(t.TempDir(), "before")}
	must(t, build(b.path, "-C", folder))
	return b, folder, released
}

func TestUpgrade(t *testing.T) {
	before, folder, released := programBefore(t)
	now := programBuild{"example.org/sidecar:now", binary}
	t.Run("users of now", func(t *testing.T) { thereAndBack(t, before, now, ".") })
	if released && usersOfBeforeDo {
		t.Run("users of before", func(t *testing.T) { thereAndBack(t, before, now, folder) })
	}
}

// thereAndBack upgrades, and goes back, with the users of one folder's deploy/.
func thereAndBack(t *testing.T, before, now programBuild, users string) {
	u := startUpgrade(t, users)
	u.roll(before, now, upgradeStage)
	for _, p := range u.problems[:min(len(u.problems), 50)] {
		t.Error(p)
	}
	t.Logf("pods: %v", u.done)
	u.wantNothingLeft(t)
}

// roll lets all run on one build, on both, on the other, on both again, and on the first again. It returns at the first problem.
func (u *upgrade) roll(before, now programBuild, stage time.Duration) {
	u.serve(before, before)
	stopLooking := u.look()
	l := &upgradeLine{upgrade: u, id: freshID()}
	deny, wait, both := freshID(), freshID(), freshID()
	end := make(chan struct{})
	staying := func(name string, id semaphoreID, length int, whenFull string) {
		u.start(upgradePod{name: name, id: id, length: length, whenFull: whenFull, until: func() <-chan struct{} { return end }})
	}
	staying("early-deny", deny, 3, whenFullDeny) // all the time, with the sidecars of before
	staying("early-wait", wait, 4, whenFullWait)
	for i := range upgradeWorkers {
		u.pods.Go(func() { u.comeAndGo(i, deny, wait, both) })
	}
	change := func(joining, leaving int) {
		for range leaving {
			l.next()
		}
		for range joining {
			l.join()
		}
		select {
		case <-time.After(stage):
		case <-u.failed:
		}
	}
	for _, step := range []func(){
		func() { change(5, 0) },
		func() {
			u.serve(before, now)
			u.serve(now, before)
			u.serve(now, now)
			change(3, 1)
			u.wantAllCombinations()
		},
		func() {
			u.retire(before)
			staying("late-deny", deny, 3, whenFullDeny) // from now on, with the sidecars of now
			staying("late-wait", wait, 4, whenFullWait)
			change(2, 2)
		},
		func() {
			u.serve(before, now)
			u.serve(now, before)
			u.serve(before, before)
			change(3, 2)
		},
		func() {
			u.retire(now)
			change(1, 3)
		},
	} {
		if !isClosed(u.failed) {
			step()
		}
	}
	close(u.stop)
	close(end)
	l.leave()
	u.pods.Wait()
	u.retire(before)
	stopLooking()
}

// wantAllCombinations waits until pods that deny and that wait have come and gone with each webhook that serves.
func (u *upgrade) wantAllCombinations() {
	for deadline := time.Now().Add(upgradePatience); !isClosed(u.failed); time.Sleep(5 * time.Millisecond) {
		u.mu.Lock()
		met := maps.Clone(u.done)
		u.mu.Unlock()
		if len(met) == len(u.serving)*len(upgradeKinds) {
			return
		}
		if time.Now().After(deadline) {
			u.problem("%d webhooks serve, and only these pods have come and gone: %v", len(u.serving), met)
		}
	}
}

// comeAndGo lets one pod after another come and go.
func (u *upgrade) comeAndGo(worker int, deny, wait, both semaphoreID) {
	for n := worker; !isClosed(u.stop) && !isClosed(u.failed); n++ {
		p := upgradePod{name: fmt.Sprintf("pod-%d-%d", worker, n), until: forAWhile}
		switch worker % 4 {
		case 0:
			p.id, p.length, p.whenFull = deny, 3, whenFullDeny
		case 1:
			p.id, p.length, p.whenFull = wait, 4, whenFullWait
		case 2: // the length that pods say changes
			p.id, p.length, p.whenFull = both, 3+n/4%3, whenFullWait
		case 3:
			p.id, p.length, p.whenFull, p.mayFail = both, 3+n/4%3, whenFullDeny, true
		}
		u.run(p)
	}
}

// upgradeLine is a semaphore of three tokens before which pods stand in line from one change to the next.
type upgradeLine struct {
	*upgrade
	id     semaphoreID
	joined []string
	ends   []func()
	ended  int
}

// join lets another pod stand in line.
func (l *upgradeLine) join() {
	end := make(chan struct{})
	name := fmt.Sprintf("line-%d", len(l.joined))
	l.joined, l.ends = append(l.joined, name), append(l.ends, func() { close(end) })
	l.start(upgradePod{name: name, id: l.id, length: 3, whenFull: whenFullWait, inLine: true, until: func() <-chan struct{} { return end }})
	l.wantOrder()
}

// next ends the pod that came first, so that one in line gets its token.
func (l *upgradeLine) next() {
	l.ends[l.ended]()
	l.ended++
	l.wantOrder()
}

// leave ends all, one after the other.
func (l *upgradeLine) leave() {
	for l.ended < len(l.joined) {
		l.next()
	}
}

// wantOrder waits until as many pods as may have a token, in the order in which they came, and the others stand in line.
func (l *upgradeLine) wantOrder() {
	want := l.joined[:min(len(l.joined), l.ended+3)]
	var err error
	for deadline := time.Now().Add(upgradePatience); !isClosed(l.failed) && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		l.mu.Lock()
		got := slices.Clone(l.order)
		l.mu.Unlock()
		var waiting int
		waiting, err = redis.Int(l.queue.control.Do("ZCARD", l.id.waitersKey()))
		switch {
		case err != nil:
		case len(got) >= len(want) && !slices.Equal(got, want):
			l.problem("the pods in line got tokens in the order %v, and came as %v", got, l.joined)
			return
		case len(got) == len(want) && waiting == len(l.joined)-len(want):
			return
		default:
			err = fmt.Errorf("%v have a token, and %d wait; want %v, and %d", got, waiting, want, len(l.joined)-len(want))
		}
	}
	if !isClosed(l.failed) {
		l.problem("the line does not go on: %v", err)
	}
}

// wantNothingLeft checks what is left in Redis when all pods are gone: what expires within minutes, and all tokens.
func (u *upgrade) wantNothingLeft(t *testing.T) {
	t.Helper()
	if t.Failed() {
		return
	}
	keys, err := redis.Strings(u.queue.control.Do("KEYS", "*"))
	must(t, err)
	for _, key := range keys {
		kind, _, _ := strings.Cut(key, "/")
		if left, err := redis.Int(u.queue.control.Do("TTL", key)); err != nil || left < 0 || left > 300 {
			t.Errorf("%s expires in %d s, %v", key, left, err)
		}
		if kind != "queue" && kind != "state" {
			t.Errorf("%s is still there", key)
		}
	}
	c := testConfig(u.queue.address)
	c.redis = redisSettings{username: "webhook", password: testPassword}
	c.redisAddresses = u.locks
	s := semaphoresOf(t, c)
	for id, length := range u.most {
		for n := range length {
			if _, _, err := s.acquire(t.Context(), id, "", length, time.Second); err != nil {
				t.Errorf("of the %d tokens of %s, the %d. cannot be taken: %v", length, id, n+1, err)
			}
		}
		wantFullError(t, s, id, length, length)
	}
}

// Programs that do not go together are found.
func TestUpgradeFindsWhatIsBroken(t *testing.T) {
	before, _, _ := programBefore(t)
	for _, c := range []struct{ name, file, old, new, without, want string }{
		{name: "users lack a command", without: "+zrank", want: "NOPERM|can't run this command|ACL failure in script"}, // see isDenied
		{name: "tokens in use are kept elsewhere", file: "semaphore.go", old: `"inflight/{"`, new: `"queue/inflight/{"`,
			want: "hold a token, and|not in flight"},
		{name: "arrivals have another unit", file: "lua/acquire.lua", old: "math.max(micros, last + 1)", new: "math.max(now, 1)", want: "in the order"},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := programBuild{"example.org/sidecar:now", binary}
			if c.file != "" {
				now.path = buildBroken(t, []edit{{c.file, c.old, c.new}})
			}
			u := startUpgrade(t, ".", c.without)
			u.roll(before, now, upgradeStage)
			for _, p := range u.problems {
				for want := range strings.SplitSeq(c.want, "|") {
					if strings.Contains(p, want) {
						t.Logf("found: %s", p)
						return
					}
				}
			}
			t.Errorf("not found: %q", u.problems)
		})
	}
}
