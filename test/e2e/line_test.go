//go:build e2e

package e2e

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// line is a semaphore of length 2 with two holders, and with waiters.
type line struct {
	*diary
	holders, waiters []corev1.Pod
	made             int
	started          []string // names of all pods whose apps started, in order
	temporary        bool     // its namespace ends with the subtest
}

func newLine(n *namespace, waiters int) *line {
	n.Helper()
	l := &line{diary: newDiary(n)}
	for range 2 {
		name := l.createNext()
		l.holders = append(l.holders, n.wantRunning(name))
		l.started = append(l.started, name)
	}
	l.fill(waiters)
	return l
}

// createNext creates another pod of the semaphore and returns its name.
func (l *line) createNext() string {
	l.Helper()
	name := fmt.Sprintf("p-%d", l.made)
	l.made++
	l.create(waiting(pod(name, "line", 2, l.app(untilTold))))
	return name
}

// fill creates waiters until there are so many. Those that are created at the same time
// may join the line in any order.
func (l *line) fill(waiters int) {
	l.Helper()
	var names []string
	for len(l.waiters)+len(names) < waiters {
		names = append(names, l.createNext())
	}
	joined := map[string]corev1.Pod{}
	for _, name := range names {
		p := l.wantWaiting(name)
		joined[string(p.UID)] = p
	}
	var tokens []string
	eventually(l.T, patience, func() (err error) {
		tokens, err = l.redis("line", "ZRANGE 'waiters/{KEY}' 0 -1")
		if err == nil && len(tokens) != waiters {
			err = fmt.Errorf("in line: %v; want %d", tokens, waiters)
		}
		return err
	})
	for _, token := range tokens {
		if p, ok := joined[token]; ok {
			l.waiters = append(l.waiters, p)
		}
	}
	l.wantWaiters("line", l.waiters...)
}

// moveOn ends the first holder, and waits until the app of the first waiter has started.
func (l *line) moveOn() {
	l.Helper()
	l.end(l.holders[0].Name)
	l.wantMoved()
}

// wantMoved waits until the app of the first waiter has started in the place of the first
// holder.
func (l *line) wantMoved() {
	l.Helper()
	first := l.waiters[0]
	l.wantStarted(first.Name)
	l.started = append(l.started, first.Name)
	l.holders, l.waiters = append(l.holders[1:], first), l.waiters[1:]
}

// wantOrder checks that the apps started in the order of the line, and that never too
// many worked at the same time.
func (l *line) wantOrder() {
	l.Helper()
	l.wantNeverMoreThan(2)
	if got := podsOf(l.shifts()); !slices.Equal(got, l.started) {
		l.Errorf("the apps started in the order %v, want %v", got, l.started)
	}
}

// wantWhole checks that Redis still has the line, and that the line moves on. Then
// another waiter joins it.
func (l *line) wantWhole() {
	l.Helper()
	l.wantHolders("line", l.holders...)
	l.wantWaiters("line", l.waiters...)
	l.wantCounts("line", 0, 2)
	l.wantNeverMoreThan(2)
	l.moveOn()
	l.wantHolders("line", l.holders...)
	l.wantWaiters("line", l.waiters...)
	l.wantOrder()
	l.wantNoRestarts(slices.Concat(l.holders, l.waiters)...)
	l.fill(len(l.waiters) + 1)
}

// wantNoRestarts checks that no container of the pods was restarted.
func (n *namespace) wantNoRestarts(pods ...corev1.Pod) {
	n.Helper()
	for _, p := range pods {
		p, err := n.get(p.Name)
		must(n.T, err)
		for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
			if c.RestartCount > 0 {
				n.Errorf("%s: %s was restarted", p.Name, c.Name)
			}
		}
	}
}
