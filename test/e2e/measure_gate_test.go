//go:build e2e

package e2e

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Time until an unrelated pod runs on a node of two cores, while seven of eight pods that
// request 400m wait in line.
func TestMeasureGateRoom(t *testing.T) {
	needMeasure(t)
	installGate(t)
	took := roomBesideGated(t, "400m", "300m")
	t.Logf("gate: a pod of 300m runs %s after its creation, beside one of 400m that works and seven that are gated",
		inSeconds(took))
	if most := 5 * time.Second; took > most {
		t.Errorf("want %s at most", most)
	}
}

// Time from the end of an app to the start of the next one, of gated pods. Beside it, the
// start of a pod with another gate, which the test lifts.
//
// The apps note their starts and ends by the clock of the node. An end is noted at
// SIGTERM, before the container has ended, before the kubelet has told the sidecar, and
// before the sidecar has given back the token. The gate counts as lifted when a watch of
// the test reports it. The pods that the test lifts have the same containers and a free
// token. Their time begins when the test sends the patch, over an open connection. The
// two kinds take turns, and neither begins before the pods of the other are gone.
//
// In the middle, both gates are killed, and the holder ends at once. This turn is logged
// alone.
func TestMeasureGateHandOver(t *testing.T) {
	needMeasure(t)
	const turns, inLine, killed = 51, 5, 25
	n := newNamespace(t)
	installGate(t)
	clock := nodeClock(t)
	d, seen := newDiary(n), api.watchPods(n)
	byTest := newOtherGate(t, clock)

	d.handOver(turns, inLine, gated, func(turn int) {
		seen.wantMost(t, 1+inLine)
		byTest.lift()
		if turn == killed {
			_, err := hook("delete", "pod", "-l", "app.kubernetes.io/component=gate", "--grace-period=0", "--force")
			must(t, err)
		}
	})
	shifts := d.shifts()
	var order []string
	for i := range turns + 1 {
		order = append(order, fmt.Sprintf("p-%d", i))
	}
	if got := podsOf(shifts); !slices.Equal(got, order) {
		t.Errorf("the apps started in the order %v, want %v", got, order)
	}
	if len(shifts) != turns+1 {
		t.Fatalf("%d apps were at work, want %d", len(shifts), turns+1)
	}

	var toLifted, toStart, fromLifted []time.Duration
	for i := range turns {
		lifted := clock(seen.liftedAt(t, shifts[i+1].pod))
		toLift, whole := lifted-shifts[i].end, shifts[i+1].start-shifts[i].end
		if i == killed {
			t.Logf("gate, both gates killed just before: end of an app to the lifted gate of the next %s, to its start %s",
				inSeconds(toLift), inSeconds(whole))
			continue
		}
		toLifted, toStart = append(toLifted, toLift), append(toStart, whole)
		fromLifted = append(fromLifted, whole-toLift)
	}
	lift, start, other := figuresOf(toLifted), figuresOf(toStart), figuresOf(byTest.toStart)
	ratio := float64(start.median) / float64(other.median)
	t.Logf("gate, %d in line, end of an app to the lifted gate of the next:  %s", inLine, lift)
	t.Logf("gate, %d in line, end of an app to the start of the next:        %s", inLine, start)
	t.Logf("another gate, the patch that lifts it to the start of the app:  %s", other)
	t.Logf("the medians of the starts are as 1 to %.2f; from the lifted gate on: %s; of the other gate: %s",
		ratio, figuresOf(fromLifted), figuresOf(byTest.fromLifted))
	if lift.n < 50 || lift.median > 300*time.Millisecond || lift.most > time.Second {
		t.Errorf("want 50 or more, lifted after 0.3 s at most in the median, and none after more than 1 s: %v", toLifted)
	}
	if ratio > 1.3 {
		t.Errorf("want 1 to 1.3 at most: %v; of the other gate: %v", toStart, byTest.toStart)
	}

	// Nothing was lost: all are still in line. When they are gone, the token is free.
	d.wantNeverMoreThan(1)
	n.kubectl("delete", "pods", "--all")
	n.wantCounts("turns", 1, 0)
}

// otherGate makes pods that are like gated ones, with a gate that the test lifts.
type otherGate struct {
	*diary
	seen                *podWatch
	clock               func(time.Time) time.Duration
	made                int
	toStart, fromLifted []time.Duration // from the patch, and from the report of the watch, to the start of the app
}

func newOtherGate(t *testing.T, clock func(time.Time) time.Duration) *otherGate {
	n := newNamespace(t)
	return &otherGate{diary: newDiary(n), seen: api.watchPods(n), clock: clock}
}

// lift lets a pod start, and ends it.
func (o *otherGate) lift() {
	o.Helper()
	name := fmt.Sprintf("p-%d", o.made)
	o.made++
	other := object{"schedulingGates": []object{{"name": "example.org/other"}}}
	o.create(waiting(pod(name, "free", 1000, other, o.app(untilTold))))
	o.wantGated(name)
	sent := o.clock(time.Now())
	must(o.T, errOf(api.do(http.MethodPatch, o.path()+"/"+name, "application/json-patch+json", []object{
		{"op": "test", "path": "/spec/schedulingGates/0/name", "value": "example.org/other"},
		{"op": "remove", "path": "/spec/schedulingGates/0"},
	})))
	o.wantStarts(o.made)
	start := o.shifts()[o.made-1].start
	o.toStart = append(o.toStart, start-sent)
	o.fromLifted = append(o.fromLifted, start-o.clock(o.seen.liftedAt(o.T, name)))
	o.end(name)
	o.seen.wantMost(o.T, 0)
}

// A thousand gated pods are created as fast as the API server takes them, and five may
// run. The test measures when they are in line, in which order, and when half of them,
// deleted, have left the line.
//
// The creation time of a pod, and so its place, is exact to the second. For pods of the
// same second, the test counts the swaps by the resource version: their creation was
// their only change.
func TestMeasureGateThousand(t *testing.T) {
	needMeasure(t)
	const many, length, fewer = 1000, 5, 500
	n := newNamespace(t)
	installGate(t)

	start := time.Now()
	names := make(chan int)
	var creators sync.WaitGroup
	for range 16 {
		creators.Go(func() {
			for i := range names {
				p := gated(pod(fmt.Sprintf("p-%04d", i), "many", length))
				p["metadata"].(object)["labels"] = object{"half": strconv.Itoa(i / fewer)}
				if err := n.tryCreate(p); err != nil {
					t.Errorf("create: %v", err)
				}
			}
		})
	}
	for i := range many {
		names <- i
	}
	close(names)
	creators.Wait()
	created := time.Now()
	n.wantInLine("many", many-length)
	inLine := time.Now()
	t.Logf("gate: %d pods were created in %s; all were in line %s after the last",
		many, inSeconds(created.Sub(start)), inSeconds(inLine.Sub(created)))
	if most := 15 * time.Second; inLine.Sub(created) > most {
		t.Errorf("want %s at most", most)
	}

	var list corev1.PodList
	must(t, json.Unmarshal([]byte(n.kubectl("get", "pods", "-o", "json")), &list))
	pods := map[string]corev1.Pod{}
	for _, p := range list.Items {
		pods[string(p.UID)] = p
	}
	line, err := n.redis("many", "ZRANGE 'waiters/{KEY}' 0 -1")
	must(t, err)
	swapped := 0
	for i, token := range line[1:] {
		before, after := pods[line[i]], pods[token]
		switch c := after.CreationTimestamp.Compare(before.CreationTimestamp.Time); {
		case c < 0:
			t.Errorf("%s, created at %s, stands behind %s, created at %s",
				after.Name, after.CreationTimestamp, before.Name, before.CreationTimestamp)
		case c == 0 && version(t, after) < version(t, before):
			swapped++
		}
	}
	t.Logf("gate: %d are in line, in the order of the seconds in which they were created; "+
		"of two neighbours of the same second, %d times the later one is ahead", len(line), swapped)

	start = time.Now()
	_, err = api.do(http.MethodDelete, n.path()+"?labelSelector=half%3D1", "", nil)
	must(t, err)
	deleted := time.Now()
	n.wantInLine("many", many-length-fewer)
	gone := time.Now()
	t.Logf("gate: %d of them were deleted in %s; the line was as much shorter %s after the last",
		fewer, inSeconds(deleted.Sub(start)), inSeconds(gone.Sub(deleted)))
	if most := 5 * time.Second; gone.Sub(deleted) > most {
		t.Errorf("want %s at most", most)
	}
	_, err = api.do(http.MethodDelete, n.path(), "", nil)
	must(t, err)
	n.wantCounts("many", length, 0)
}

// version returns the resource version of the pod.
func version(t *testing.T, p corev1.Pod) int {
	t.Helper()
	n, err := strconv.Atoi(p.ResourceVersion)
	must(t, err)
	return n
}

// wantInLine waits until the line has that length.
func (n *namespace) wantInLine(key string, want int) {
	n.Helper()
	eventually(n.T, time.Minute, func() error {
		got, err := n.redis(key, "ZCARD 'waiters/{KEY}'")
		if err == nil && !slices.Equal(got, []string{strconv.Itoa(want)}) {
			err = fmt.Errorf("%v are in line, want %d", got, want)
		}
		return err
	})
}

// podWatch notes what a watch reports of the pods of a namespace, and when.
type podWatch struct {
	mu     sync.Mutex
	gated  map[string]bool      // all pods that exist
	lifted map[string]time.Time // when the watch reported them without a gate
	err    error                // why the watch has ended
}

func (a *apiProxy) watchPods(n *namespace) *podWatch {
	n.Helper()
	response, err := http.Get("http://" + a.address + n.path() + "?watch=true&timeoutSeconds=7200")
	must(n.T, err)
	n.Cleanup(func() { response.Body.Close() })
	w := &podWatch{gated: map[string]bool{}, lifted: map[string]time.Time{}}
	go func() {
		for events := json.NewDecoder(response.Body); ; {
			var event struct {
				Type   string
				Object corev1.Pod
			}
			err := events.Decode(&event)
			if err == nil && event.Type == "ERROR" {
				err = errors.New("the watch has ended")
			}
			w.note(event.Type == "DELETED", &event.Object, err)
			if err != nil {
				return
			}
		}
	}()
	return w
}

func (w *podWatch) note(deleted bool, p *corev1.Pod, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	gated := len(p.Spec.SchedulingGates) > 0
	switch {
	case err != nil:
		w.err = err
	case deleted:
		delete(w.gated, p.Name)
	case w.gated[p.Name] && !gated:
		w.lifted[p.Name] = time.Now()
		fallthrough
	default:
		w.gated[p.Name] = gated
	}
}

// liftedAt returns when the watch reported that the gate of a pod was lifted.
func (w *podWatch) liftedAt(t *testing.T, pod string) time.Time {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	at, ok := w.lifted[pod]
	if !ok {
		t.Fatalf("the watch has not reported that the gate of %s is lifted: %v", pod, w.err)
	}
	return at
}

// wantMost waits until there are at most so many pods.
func (w *podWatch) wantMost(t *testing.T, most int) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.gated) > most {
			return cmp.Or(w.err, fmt.Errorf("there are %v, want %d", slices.Sorted(maps.Keys(w.gated)), most))
		}
		return nil
	})
}

// nodeClock returns a function that converts a time of the test into the time of the
// node, which the apps note. It is wrong by at most half of the time that the node takes
// to answer, and by the hundredth of a second to which the answer is exact.
func nodeClock(t *testing.T) func(time.Time) time.Duration {
	t.Helper()
	var at time.Time
	var up time.Duration
	best := time.Hour
	for range 50 {
		asked := time.Now()
		told := uptime(t)
		if took := time.Since(asked); took < best {
			best, at, up = took, asked.Add(took/2), told
		}
	}
	t.Logf("the clock of the node is known to within %s", best/2+10*time.Millisecond)
	return func(then time.Time) time.Duration { return up + then.Sub(at) }
}
