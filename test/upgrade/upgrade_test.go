package upgrade

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestMain(m *testing.M) { rig.Main(m, "make test-upgrade") }

const (
	stage   = 5 * time.Second // shortest time between two changes
	workers = 16              // pods that run at the same time
)

// whenFullOfPods has the values of the annotation when-full of this test's pods.
var whenFullOfPods = []string{rig.WhenFullDeny, rig.WhenFullWait}

// usersOfBeforeDo states whether this program works with the Redis users of the last
// release. If it does not, the changelog lists the new rules.
const usersOfBeforeDo = true

// TestUpgrade upgrades and goes back. Without a release, the programs are HEAD and HEAD
// with the uncommitted changes.
func TestUpgrade(t *testing.T) {
	before, folder, released := programBefore(t)
	now := programNow(t)
	// Sidecars of a webhook that is gone go on after a loss of all scripts.
	loses := released || maps.Equal(luaFiles(t, filepath.Join(folder, "lua")), luaFiles(t, rig.Path("lua")))
	t.Run("users of now", func(t *testing.T) { thereAndBack(t, before, now, now, loses) })
	if released && usersOfBeforeDo {
		t.Run("users of before", func(t *testing.T) { thereAndBack(t, before, now, before, loses) })
	}
}

// A webhook loads the scripts of the last release, as that release has them.
func TestPreviousScripts(t *testing.T) {
	commit, released, err := commitBefore()
	rig.Must(t, err)
	want := map[string]string{}
	if released {
		folder := t.TempDir()
		rig.Must(t, export(commit, folder))
		want = luaFiles(t, filepath.Join(folder, "lua"))
	}
	if !maps.Equal(luaFiles(t, rig.Path("lua/previous")), want) {
		t.Errorf("lua/previous must have exactly the %d scripts of %s", len(want), commit)
	}
}

// thereAndBack upgrades and goes back, with the users of one build.
func thereAndBack(t *testing.T, before, now, users programBuild, losesScripts bool) {
	u := startInstallation(t, users)
	u.losesScripts = losesScripts
	u.roll(before, now)
	for _, p := range u.problems[:min(len(u.problems), 50)] {
		t.Error(p)
	}
	t.Logf("pods: %v", u.done)
	u.wantNothingLeft(t, now)
}

// roll runs the first build, both, the second, both again, and the first again. It
// returns at the first problem.
func (u *installation) roll(before, now programBuild) {
	u.serve(before, before)
	stopWatch := u.watch()
	l := &line{installation: u, id: rig.FreshID()}
	deny, wait, both := rig.FreshID(), rig.FreshID(), rig.FreshID()
	end := make(chan struct{})
	staying := func(name string, id rig.ID, length int, whenFull string) {
		until := func() <-chan struct{} { return end }
		u.start(pod{name: name, id: id, length: length, whenFull: whenFull, until: until})
	}
	staying("early-deny", deny, 3, rig.WhenFullDeny) // to the end, with the earlier sidecars
	staying("early-wait", wait, 4, rig.WhenFullWait)
	for i := range workers {
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
			if u.losesScripts {
				u.loseScripts()
			}
			staying("late-deny", deny, 3, rig.WhenFullDeny) // from here, with the present sidecars
			staying("late-wait", wait, 4, rig.WhenFullWait)
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
	stopWatch()
}

// wantAllCombinations waits until pods that deny and pods that wait have come and gone
// with each serving webhook.
func (u *installation) wantAllCombinations() {
	for deadline := time.Now().Add(patience); !isClosed(u.failed); time.Sleep(5 * time.Millisecond) {
		u.mu.Lock()
		met := maps.Clone(u.done)
		u.mu.Unlock()
		if len(met) == len(u.serving)*len(whenFullOfPods) {
			return
		}
		if time.Now().After(deadline) {
			u.problem("%d webhooks serve, and only these pods have come and gone: %v", len(u.serving), met)
		}
	}
}

// comeAndGo runs one pod after another.
func (u *installation) comeAndGo(worker int, deny, wait, both rig.ID) {
	for n := worker; !isClosed(u.stop) && !isClosed(u.failed); n++ {
		p := pod{name: fmt.Sprintf("pod-%d-%d", worker, n), until: forAWhile}
		switch worker % 4 {
		case 0:
			p.id, p.length, p.whenFull = deny, 3, rig.WhenFullDeny
		case 1:
			p.id, p.length, p.whenFull = wait, 4, rig.WhenFullWait
		case 2: // the length changes from pod to pod
			p.id, p.length, p.whenFull = both, 3+n/4%3, rig.WhenFullWait
		case 3:
			p.id, p.length, p.whenFull, p.mayFail = both, 3+n/4%3, rig.WhenFullDeny, true
		}
		u.run(p)
	}
}

// line is a semaphore of three tokens. Its pods wait in line while the program changes.
type line struct {
	*installation
	id     rig.ID
	joined []string
	ends   []func()
	ended  int
}

// join adds a pod to the line.
func (l *line) join() {
	end := make(chan struct{})
	name := fmt.Sprintf("line-%d", len(l.joined))
	l.joined, l.ends = append(l.joined, name), append(l.ends, func() { close(end) })
	until := func() <-chan struct{} { return end }
	l.start(pod{name: name, id: l.id, length: 3, whenFull: rig.WhenFullWait, inLine: true, until: until})
	l.wantOrder()
}

// next ends the oldest running pod. The first pod in line must get its token.
func (l *line) next() {
	l.ends[l.ended]()
	l.ended++
	l.wantOrder()
}

// leave ends all pods, one after another.
func (l *line) leave() {
	for l.ended < len(l.joined) {
		l.next()
	}
}

// wantOrder waits until as many pods as allowed have a token, in the order of their
// creation, and the others wait.
func (l *line) wantOrder() {
	want := l.joined[:min(len(l.joined), l.ended+3)]
	var err error
	deadline := time.Now().Add(patience)
	for ; !isClosed(l.failed) && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		l.mu.Lock()
		got := slices.Clone(l.order)
		l.mu.Unlock()
		var waiting int
		waiting, err = redis.Int(l.queue.Control.Do("ZCARD", l.id.WaitersKey()))
		switch {
		case err != nil:
		case len(got) >= len(want) && !slices.Equal(got, want):
			l.problem("the pods in line got tokens in the order %v, and came as %v", got, l.joined)
			return
		case len(got) == len(want) && waiting == len(l.joined)-len(want):
			return
		default:
			err = fmt.Errorf("%v have a token, and %d wait; want %v, and %d",
				got, waiting, want, len(l.joined)-len(want))
		}
	}
	if !isClosed(l.failed) {
		l.problem("the line does not move: %v", err)
	}
}

// wantNothingLeft checks what Redis holds after all pods have ended: all tokens, in keys
// that expire within minutes, and the histories.
func (u *installation) wantNothingLeft(t *testing.T, now programBuild) {
	t.Helper()
	if t.Failed() {
		return
	}
	keys, err := redis.Strings(u.queue.Control.Do("KEYS", "*"))
	rig.Must(t, err)
	for _, key := range keys {
		kind, _, _ := strings.Cut(key, "/")
		most := map[string]int{"queue": 300, "state": 300, "history": 3 * 86400}[kind]
		if left, err := redis.Int(u.queue.Control.Do("TTL", key)); err != nil || left < 0 || left > most {
			t.Errorf("%s expires in %d s, want at most %d, %v", key, left, most, err)
		}
	}
	w := u.startWebhook(now, now)
	for id, length := range u.most {
		for n := range length {
			if a := w.Admit(t, rig.Review(t, id, length)); !a.Allowed {
				t.Errorf("of the %d tokens of %s, the %d. cannot be taken: %s", length, id, n+1, a.Message)
			}
		}
		full := fmt.Sprintf("no semaphore available: %s has %d of %d tokens in use", id, length, length)
		if a := w.Admit(t, rig.Review(t, id, length)); a.Allowed || !strings.HasPrefix(a.Message, full) {
			t.Errorf("admitted: %t, %s; want %q", a.Allowed, a.Message, full)
		}
	}
}

// TestUpgradeFindsBrokenScripts checks that the suite detects two programs that do not
// work together.
func TestUpgradeFindsBrokenScripts(t *testing.T) {
	before, _, _ := programBefore(t)
	for _, c := range []struct {
		name    string
		edit    rig.Edit
		without string   // a rule that the users lack
		want    []string // a problem must contain one of these
	}{
		{
			name:    "users lack a command",
			without: "+zrank",
			// The text depends on the version of Redis.
			want: []string{"NOPERM", "can't run this command", "ACL failure in script"},
		},
		{
			name: "tokens in use are kept elsewhere",
			edit: rig.Edit{File: "queue.go", From: `"inflight/{"`, To: `"queue/inflight/{"`},
			want: []string{"hold a token, and", "not in flight", "NOPERM"},
		},
		{
			name: "arrivals have another unit",
			edit: rig.Edit{File: "lua/acquire.lua", From: "math.max(micros, last + 1, line.lentTo + 1,", To: "math.max(now, 1,"},
			want: []string{"in the order"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := programNow(t)
			if c.edit != (rig.Edit{}) {
				now.path = rig.BuildBroken(t, []rig.Edit{c.edit})
			}
			u := startInstallation(t, programNow(t), c.without)
			u.roll(before, now)
			for _, p := range u.problems {
				for _, want := range c.want {
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
