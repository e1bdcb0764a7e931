//go:build e2e

package e2e

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// diary is a file on the node. Apps note their starts and ends in it.
type diary struct {
	*namespace
	dir string
}

func newDiary(n *namespace) *diary {
	n.Helper()
	d := &diary{n, fmt.Sprintf("/var/tmp/at-least-semaphore-pod-hook-e2e/diary-%s-%08x", n.name, rand.Uint32())}
	must(n.T, onNode(fmt.Sprintf("mkdir -p %s && : >%s/notes && chmod -R 777 %s", d.dir, d.dir, d.dir)))
	n.Cleanup(func() { _ = onNode("rm -rf " + d.dir) })
	return d
}

// untilTold is work that goes on until SIGTERM. It notes each second that the app is
// alive.
const untilTold = "while :; do sleep 1 & wait $!; note alive; done"

// app returns the spec of a pod whose app notes its start, works, and notes its end, by
// the clock of the node. more replaces parts of its container.
func (d *diary) app(work string, more ...object) object {
	script := `note() { read up rest </proc/uptime; echo "$1 $POD $up $UID" >>/diary/notes; }
		trap 'note end; exit 0' TERM; note start; ` + work + `; note end`
	c := container("app", script, object{
		"imagePullPolicy": "IfNotPresent",
		"env": []object{
			{"name": "POD", "valueFrom": object{"fieldRef": object{"fieldPath": "metadata.name"}}},
			{"name": "UID", "valueFrom": object{"fieldRef": object{"fieldPath": "metadata.uid"}}},
		},
		"volumeMounts": []object{{"name": "diary", "mountPath": "/diary"}},
	})
	for _, m := range more {
		maps.Copy(c, m)
	}
	return object{"containers": []object{c}, "volumes": []object{
		{"name": "diary", "hostPath": object{"path": d.dir, "type": "Directory"}},
	}}
}

// shift is the work of one app. Times count from the boot of the node.
type shift struct {
	pod, uid         string
	start, seen, end time.Duration // seen is the last note before the end
	ended            bool          // if not, end is the distant future
}

const distantFuture = time.Duration(1<<63 - 1)

// read returns all shifts in the order of their starts.
func (d *diary) read() ([]shift, error) {
	out, err := nodeOutput("cat " + d.dir + "/notes")
	if err != nil {
		return nil, err
	}
	var shifts []shift
	open := map[string]int{} // index of the last shift of a pod
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		if len(words) != 4 {
			return nil, fmt.Errorf("note %q", line)
		}
		what, pod, uid := words[0], words[1], words[3]
		at, err := parseUptime(words[2])
		if err != nil {
			return nil, err
		}
		i, ok := open[pod]
		switch {
		case what == "start":
			if ok && !shifts[i].ended { // the app was killed
				shifts[i].end, shifts[i].ended = at, true
			}
			open[pod] = len(shifts)
			shifts = append(shifts, shift{pod, uid, at, at, distantFuture, false})
		case !ok:
			return nil, fmt.Errorf("%s noted %q before its start", pod, what)
		case what == "end":
			shifts[i].end, shifts[i].ended = at, true
		default:
			shifts[i].seen = at
		}
	}
	slices.SortStableFunc(shifts, func(a, b shift) int { return cmp.Compare(a.start, b.start) })
	return shifts, nil
}

// shifts is read that must succeed. The shift of an app that was killed, and noted no
// end, ends with its last note.
func (d *diary) shifts() []shift {
	d.Helper()
	shifts, err := d.read()
	must(d.T, err)
	running, err := nodeOutput(`for f in $(grep -ls /diary/notes /proc/[0-9]*/cmdline); do
		cat "${f%cmdline}cgroup"
	done 2>/dev/null | tr _ -`)
	must(d.T, err)
	for i, s := range shifts {
		if !s.ended && !strings.Contains(running, s.uid) {
			shifts[i].end, shifts[i].ended = s.seen, true
		}
	}
	return shifts
}

// wantStarted waits until a pod's app has noted its start.
func (d *diary) wantStarted(pod string) {
	d.Helper()
	eventually(d.T, patience, func() error {
		shifts, err := d.read()
		if err == nil && !slices.ContainsFunc(shifts, func(s shift) bool { return s.pod == pod }) {
			err = fmt.Errorf("the app of %s has not started; these have: %v", pod, podsOf(shifts))
		}
		return err
	})
}

// wantStarts waits until the diary has that number of starts.
func (d *diary) wantStarts(starts int) {
	d.Helper()
	eventually(d.T, patience, func() error {
		shifts, err := d.read()
		if err == nil && len(shifts) != starts {
			err = fmt.Errorf("started: %v, want %d", podsOf(shifts), starts)
		}
		return err
	})
}

// wantNeverMoreThan checks how many apps worked at the same time.
func (d *diary) wantNeverMoreThan(most int) {
	d.Helper()
	if shifts := d.shifts(); peak(shifts) > most {
		d.Errorf("%d apps worked at the same time, want %d at most: %v", peak(shifts), most, shifts)
	}
}

func podsOf(shifts []shift) (pods []string) {
	for _, s := range shifts {
		pods = append(pods, s.pod)
	}
	return pods
}

// peak returns how many shifts there were at the same time.
func peak(shifts []shift) (most int) {
	for _, s := range shifts { // the number only grows at starts
		now := 0
		for _, other := range shifts {
			if other.start <= s.start && s.start <= other.end {
				now++
			}
		}
		most = max(most, now)
	}
	return most
}

func inSeconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

func parseUptime(text string) (time.Duration, error) {
	first, _, _ := strings.Cut(strings.TrimSpace(text), " ")
	seconds, err := strconv.ParseFloat(first, 64)
	return time.Duration(seconds * float64(time.Second)).Round(time.Millisecond), err
}

// uptime returns the time of the node, which the apps write into the diary.
func uptime(t *testing.T) time.Duration {
	t.Helper()
	out, err := nodeOutput("cat /proc/uptime")
	must(t, err)
	up, err := parseUptime(out)
	must(t, err)
	return up
}

// deployment returns a Deployment of annotated pods.
func deployment(name, key string, length, replicas int, strategy object, spec object) object {
	labels := object{"app": name}
	p := pod(name, key, length, spec)
	return object{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": object{"name": name}, "spec": object{
		"replicas": replicas, "selector": object{"matchLabels": labels}, "strategy": strategy,
		"template": object{
			"metadata": object{"labels": labels, "annotations": p["metadata"].(object)["annotations"]}, "spec": p["spec"],
		},
	}}
}

// rollingUpdate returns a strategy for a Deployment.
func rollingUpdate(maxSurge, maxUnavailable int) object {
	return object{
		"type": "RollingUpdate", "rollingUpdate": object{"maxSurge": maxSurge, "maxUnavailable": maxUnavailable},
	}
}

// watchLine records the tokens that join a line, by one command in the pod. The returned
// function ends it and returns the time at which each token joined, by the clock of
// Redis.
func (n *namespace) watchLine(key string) func() map[string]float64 {
	n.Helper()
	cmd := exec.Command("kubectl", "-n", hookNamespace, "exec", inRedis.pod, "-c", inRedis.container, "--", "sh", "-c", fmt.Sprintf(
		"while %s ZRANGE 'waiters/{%s}' 0 -1 WITHSCORES; do sleep 1; done", redisCLI, n.name+"/"+key))
	out, err := cmd.StdoutPipe()
	must(n.T, err)
	must(n.T, cmd.Start())
	joined, done := map[string]float64{}, make(chan struct{})
	go func() {
		defer close(done)
		var token string
		for s := bufio.NewScanner(out); s.Scan(); {
			if at, err := strconv.ParseFloat(s.Text(), 64); err == nil {
				joined[token] = at
			}
			token = s.Text()
		}
	}()
	return func() map[string]float64 {
		_ = cmd.Process.Kill()
		<-done
		_ = cmd.Wait()
		return joined
	}
}

// wantInOrder checks that pods started in the order in which they joined the line. Pods
// that got their tokens at the same time may start in any order; these are at most as
// many as the semaphore is long.
func (n *namespace) wantInOrder(shifts []shift, joined map[string]float64, length int) {
	n.Helper()
	var pods corev1.PodList
	must(n.T, json.Unmarshal([]byte(n.kubectl("get", "pods", "-o", "json")), &pods))
	arrival := map[string]float64{}
	for _, p := range pods.Items {
		if at, ok := joined[string(p.UID)]; ok {
			arrival[p.Name] = at
		}
	}
	swaps, worst := 0, 0
	var gap time.Duration
	for i, later := range shifts {
		overtaken := 0
		for _, s := range shifts[i+1:] {
			if arrival[s.pod] != 0 && arrival[s.pod] < arrival[later.pod] {
				overtaken++
				gap = max(gap, s.start-later.start)
			}
		}
		swaps += overtaken
		worst = max(worst, overtaken)
	}
	n.Logf("%d of %d pods waited in line; %d pairs of them started in the other order, at most %s apart; "+
		"one pod overtook %d at most", len(arrival), len(shifts), swaps, inSeconds(gap), worst)
	if worst >= length || len(arrival) < len(shifts)-2*length {
		n.Errorf("want at most %d, and at least %d in line", length-1, len(shifts)-2*length)
	}
}

// wantJobsDone runs a Job whose pods share a semaphore and work for some seconds. It
// checks their order, and that never too many work at the same time. It returns their
// shifts.
func (n *namespace) wantJobsDone(pods, length, seconds int, within time.Duration) []shift {
	n.Helper()
	d := newDiary(n)
	j := waiting(job("work", "jobs", length, "", d.app(fmt.Sprintf("sleep %d", seconds))))
	j["spec"].(object)["completions"], j["spec"].(object)["parallelism"] = pods, pods
	joined := n.watchLine("jobs")
	n.create(j)
	n.kubectl("wait", "--for=condition=Complete", "job/work", fmt.Sprintf("--timeout=%ds", int(within.Seconds())))
	d.wantNeverMoreThan(length)
	shifts := d.shifts()
	if len(shifts) != pods {
		n.Errorf("%d apps worked, want %d", len(shifts), pods)
	}
	n.wantInOrder(shifts, joined(), length)
	n.wantCounts("jobs", length, 0)
	return shifts
}

// turnovers returns the times from each end to the start that it made room for.
func turnovers(shifts []shift, length int) (gaps []time.Duration) {
	ends := slices.Clone(shifts)
	slices.SortFunc(ends, func(a, b shift) int { return cmp.Compare(a.end, b.end) })
	for i := range len(shifts) - length {
		gaps = append(gaps, shifts[length+i].start-ends[i].end)
	}
	return gaps
}

// handOver hands the token of a semaphore of length 1 from pod to pod, always with the
// same number of pods in line. when makes the pods waiting or gated. handOver calls
// before with the number of deleted pods before it deletes the next one. It returns the
// times from a deletion to the start of the next app.
func (d *diary) handOver(times, inLine int, when func(object) object, before func(turn int)) (wholes []time.Duration) {
	d.Helper()
	created := 0
	create := func() {
		d.create(when(pod(fmt.Sprintf("p-%d", created), "turns", 1, d.app(untilTold))))
		created++
	}
	create()
	d.wantStarted("p-0")
	for created <= inLine {
		create()
	}
	for i := range times {
		eventually(d.T, patience, func() error {
			got, err := d.redis("turns", "ZCARD 'waiters/{KEY}'")
			if err == nil && !slices.Equal(got, []string{strconv.Itoa(inLine)}) {
				err = fmt.Errorf("%v in line, want %d", got, inLine)
			}
			return err
		})
		before(i)
		told := uptime(d.T)
		d.end(d.shifts()[i].pod)
		d.wantStarts(i + 2)
		wholes = append(wholes, d.shifts()[i+1].start-told)
		create()
	}
	d.wantNeverMoreThan(1)
	return wholes
}
