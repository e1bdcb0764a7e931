package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The await logs what its pod waits for, and exits with 0 once the token is held. So does
// an await that starts later, as after a crash of the first.
func TestAwait(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	rig.InPod(t, token)
	early := rig.StartAwait(t) // starts before the sidecar listens
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	r.WantLine(t, id, token)
	early.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
	early.WantNotEnded(t)
	giveBack(t, s, id, holder)
	early.WantExit(t, 0)
	early.WantLog(t, heldText)
	p.WantLog(t, heldText)
	r.WantCounts(t, id, 0, 1)
	rig.StartAwait(t).WantExit(t, 0)
	rig.StartAwait(t).WantExit(t, 0)
}

// While its sidecar is killed and restarted, an await keeps waiting. It exits with 0 only
// once the token is held.
func TestAwaitOutlivesItsSidecar(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	rig.InPod(t, token)
	a := rig.StartAwait(t)
	for range 3 {
		p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
		p.WantLogPrefix(t, "waiting for a token of ")
		p.Signal(t, syscall.SIGKILL)
		<-p.Done()
		a.WantNotEnded(t)
	}
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	p.WantLogPrefix(t, "waiting for a token of ")
	giveBack(t, s, id, holder)
	a.WantExit(t, 0)
	r.WantInflight(t, id, token)
}

// A pod whose time in line is over ends its await with 75, and leaves the line. If the await
// starts again, the pod joins the end of the line. Its app starts only with a token.
func TestPodGivesUp(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	rig.InPod(t, token)
	first := rig.StartAwait(t)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--wait-seconds=1")
	text := " s in line of " + id.String() + ": 1 of 1 in use by " + holder
	first.WantExit(t, exitGaveUp)
	if log := first.Log.String(); !strings.Contains(log, `"error":"gave up after `) || !strings.Contains(log, text) {
		t.Errorf("the await logged %s, want %q in it", log, text)
	}
	r.WantLine(t, id)
	rig.Eventually(t, 10*time.Second, func() error { return gaveUpNote(r, id, token, false) })
	second := rig.StartAwait(t)
	second.WantExit(t, exitGaveUp)
	third := rig.StartAwait(t)
	giveBack(t, s, id, holder)
	third.WantExit(t, 0)
	r.WantInflight(t, id, token)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	r.WantCounts(t, id, 1, 0)
}

// gaveUpNote returns an error unless Redis knows, or does not know, that a pod gave up.
func gaveUpNote(r *rig.Redis, id semaphoreID, token string, want bool) error {
	known, err := redis.Bool(r.Control.Do("HEXISTS", id.namesKey(), token+"/gaveUp"))
	if err == nil && known != want {
		err = fmt.Errorf("Redis knows that %s gave up: %t", token, known)
	}
	return err
}

// A sidecar that is killed before an await knows that the pod gave up gets the same answer,
// although a token is free by then.
func TestSidecarKilledAfterItsPodGaveUp(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	podUID := rig.InPod(t, token)
	start := func() *rig.Process {
		return rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--wait-seconds=1", "--when-waited=fail")
	}
	p := start()
	p.WantLogPrefix(t, gaveUpPrefix)
	r.WantLine(t, id)
	giveBack(t, s, id, holder)
	for range 2 {
		p.Signal(t, syscall.SIGKILL)
		<-p.Done()
		p = start()
		p.WantLogPrefix(t, gaveUpPrefix)
	}
	rig.Must(t, gaveUpNote(r, id, token, true))
	// An await that is killed before it knows leaves all as it is.
	conn, err := net.DialUnix("unix", nil, awaitSocket(podUID))
	rig.Must(t, err)
	line := make([]byte, len(gaveUpPrefix))
	_, err = io.ReadFull(conn, line)
	rig.Must(t, err)
	conn.Close()
	rig.Must(t, gaveUpNote(r, id, token, true))
	rig.StartAwait(t).WantExit(t, exitGaveUp)
	rig.Eventually(t, 10*time.Second, func() error { return gaveUpNote(r, id, token, false) })
	r.WantCounts(t, id, 1, 0)
	rig.StartAwait(t).WantExit(t, 0)
	r.WantInflight(t, id, token)
}

// A pod may run beyond the length when its time in line is over. Others wait for it.
func TestPodRunsBeyondTheLength(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	holder := acquire(t, s, id, 1)
	token := uuid.NewString()
	rig.InPod(t, token)
	a := rig.StartAwait(t)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--wait-seconds=1", "--when-waited=run")
	a.WantExit(t, 0)
	p.WantLog(t, "took a token beyond the length: the time in line is over")
	r.WantInflight(t, id, holder, token)
	wantStatus(t, r, []string{id.String()}, `.*: 2 of 1 tokens in use .*`)
	giveBack(t, s, id, holder)
	wantFullError(t, s, id, 1, 1)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	acquire(t, s, id, 1)
}

// The await writes why its pod gave up where Kubernetes looks for it. Without the file, it
// makes none.
func TestTerminationMessage(t *testing.T) {
	t.Parallel()
	const text = gaveUpPrefix + "1 s in line of shop/web: 1 of 1 in use"
	for _, exists := range []bool{true, false} {
		podUID := uuid.NewString()
		fakeSidecar(t, podUID, func(_ int, conn net.Conn) { fmt.Fprintln(conn, text) })
		a := newAwait(podUID, slog.New(slog.DiscardHandler))
		a.message = filepath.Join(t.TempDir(), "message")
		if exists {
			rig.Must(t, os.WriteFile(a.message, []byte("older, and longer"+text), 0o600))
		}
		if err := a.run(t.Context()); exitCode(err, io.Discard) != exitGaveUp || err.Error() != text {
			t.Errorf("the await ended with %v", err)
		}
		if got, err := os.ReadFile(a.message); exists && string(got) != text || !exists && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the message is %q, %v", got, err)
		}
	}
}

// On OpenShift, the containers of a pod run as a user that no image knows, in the group
// root. There, too, await and sidecar find each other, and a sidecar that was killed finds
// its mark. If the tests do not run as root, that user is theirs.
func TestAwaitAsAnyUser(t *testing.T) {
	t.Parallel()
	r, _, id := newSemaphore(t)
	token := uuid.NewString()
	podUID := rig.InPod(t, token)
	folder, err := os.MkdirTemp("", "any-user")
	rig.Must(t, err)
	t.Cleanup(func() { os.RemoveAll(folder) })
	rig.Must(t, os.Chmod(folder, 0o755))
	program := filepath.Join(folder, "program")
	rig.Must(t, os.Link(rig.Program(t), program)) // its own folder is closed to others
	user := &syscall.SysProcAttr{}
	if os.Geteuid() == 0 {
		user.Credential = &syscall.Credential{Uid: 1000680000, Gid: 0}
	}
	start := func(args ...string) *rig.Process {
		p := rig.NewProcess(program, args...)
		p.Cmd.Env = []string{"POD_UID=" + podUID}
		p.Cmd.SysProcAttr = user
		p.Start(t)
		return p
	}
	sidecar := []string{"sidecar", "--queue-redis-address=" + rig.QueueAddress(r.Address), "--length=1",
		"--redis-addresses=" + r.Address, id.String(), token}
	p := start(sidecar...)
	start("await").WantExit(t, 0)
	p.Signal(t, syscall.SIGKILL)
	<-p.Done()
	p = start(sidecar...)
	p.WantLog(t, "started again in a running pod")
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	if text := p.Log.String(); strings.Contains(text, "WARN") {
		t.Errorf("the sidecar warns: %s", text)
	}
}

// A terminated await exits at once and with an error, with and without a sidecar: the app
// must not start.
func TestAwaitEndsOnSignal(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	acquire(t, s, id, 1)
	token := uuid.NewString()
	podUID := rig.InPod(t, token)
	for _, withSidecar := range []bool{false, true} {
		if withSidecar {
			rig.StartWaitingSidecar(t, r.Address, id, token, 1)
			r.WantLine(t, id, token)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- runAwait(ctx, podUID, slog.New(slog.DiscardHandler)) }()
		cancel()
		select {
		case err := <-ended:
			if !errors.Is(err, errNotHeld) {
				t.Errorf("with a sidecar %t: got %v", withSidecar, err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("with a sidecar %t: the await does not end", withSidecar)
		}
	}
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, "waiting for a token of ")
	a.Signal(t, syscall.SIGTERM)
	a.WantExit(t, 143)
}

// fakeSidecar serves the awaits of a pod. The function answer writes the reply to the
// n-th request.
func fakeSidecar(t *testing.T, podUID string, answer func(n int, conn net.Conn)) {
	t.Helper()
	l, err := net.ListenUnix("unix", awaitSocket(podUID))
	rig.Must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for n := 1; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			answer(n, conn)
			conn.Close()
		}
	}()
}

// The await accepts a "held" reply only soon after its request. Later, the whole pod may
// have been paused, and its token given to another pod. A real sidecar closes the
// connection instead of replying late.
func TestAwaitWantsAFreshReply(t *testing.T) {
	t.Parallel()
	podUID := uuid.NewString()
	asked := make(chan int, 10)
	var paused atomic.Int64 // total pause of the pod
	fakeSidecar(t, podUID, func(n int, conn net.Conn) {
		asked <- n
		switch n {
		case 1: // late
			paused.Add(int64(answerFresh))
			fmt.Fprintln(conn, heldText)
		case 2: // without the end of the line
			fmt.Fprint(conn, heldText)
		case 3: // no reply
		case 4:
			fmt.Fprintln(conn, heldText+" of another")
		default:
			fmt.Fprintln(conn, heldText)
		}
	})
	a := newAwait(podUID, slog.New(slog.DiscardHandler))
	start := time.Now() // no other time passes, however slow the machine is
	a.now = func() time.Time { return start.Add(time.Duration(paused.Load())) }
	rig.Must(t, a.run(t.Context()))
	if n := len(asked); n != 5 {
		t.Errorf("the await sent %d requests, want 5", n)
	}
}

// An await without a sidecar logs after a while that none answers, and what to check.
func TestAwaitWithoutSidecar(t *testing.T) {
	var b rig.Log
	a := newAwait(uuid.NewString(), slog.New(slog.NewJSONHandler(&b, nil)))
	a.answered = time.Now().Add(-awaitPatience)
	for range 3 {
		_, err := a.ask(t.Context())
		a.logUnanswered(err)
	}
	text := "the sidecar does not answer, to be asked again; it must be the init container before this one, and run"
	lines := b.Lines(t, text)
	if len(lines) != 1 || lines[0]["container"] != sidecarName ||
		!strings.Contains(lines[0]["error"].(string), "connection refused") {
		t.Errorf("logged %s", b.String())
	}
}

// In the host's network, a process of another user may answer in the place of the sidecar.
// The await does not believe it, and asks again.
func TestAwaitTrustsOnlyItsUser(t *testing.T) {
	t.Parallel()
	podUID := uuid.NewString()
	asked := make(chan int, 10)
	fakeSidecar(t, podUID, func(n int, conn net.Conn) {
		fmt.Fprintln(conn, heldText)
		asked <- n
	})
	var b rig.Log
	a := newAwait(podUID, slog.New(slog.NewJSONHandler(&b, nil)))
	a.user++
	a.answered = time.Now().Add(-awaitPatience)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.run(ctx) }()
	for range 2 {
		select {
		case <-asked:
		case err := <-ended:
			t.Fatalf("the await ended with %v", err)
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, errNotHeld) {
		t.Errorf("the await ended with %v", err)
	}
	want := fmt.Sprintf("the other end of the pod's socket is a process of the user %d, not %d", os.Geteuid(), a.user)
	if text := b.String(); !strings.Contains(text, want) {
		t.Errorf("logged %s", text)
	}
}

// A process of another user that connects to a sidecar gets no answer, and does not count
// as an await: the sidecar of a running pod goes on with its heartbeats.
func TestSidecarAnswersOnlyItsUser(t *testing.T) {
	t.Parallel()
	podUID := uuid.NewString()
	var b rig.Log
	d := newAwaitServer(startMark{}, "", slog.New(slog.NewJSONHandler(&b, nil)))
	d.user++
	d.admitted = true
	d.openUntil(time.Now().Add(time.Hour))
	go d.serve(t.Context(), podUID)
	<-d.listening
	for range 3 {
		conn, err := net.DialUnix("unix", nil, awaitSocket(podUID))
		rig.Must(t, err)
		rig.Must(t, conn.SetReadDeadline(time.Now().Add(time.Minute)))
		if text, err := io.ReadAll(conn); err != nil || len(text) > 0 {
			t.Fatalf("got %q, %v", text, err)
		}
		conn.Close()
	}
	if len(d.asked) > 0 || d.wasAsked || !d.admitted {
		t.Error("the connection counts as an await")
	}
	b.WantLines(t, "a foreign process asks for the token, and gets no answer", 1)
}

// While another process has the name of the socket, the sidecar takes no token, and tries
// again. The pod starts once the name is free.
func TestSocketInUse(t *testing.T) {
	t.Parallel()
	r, _, id := newSemaphore(t)
	token := uuid.NewString()
	other, err := net.ListenUnix("unix", awaitSocket(rig.InPod(t, token)))
	rig.Must(t, err)
	defer other.Close()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	p.WantLog(t, "cannot listen for the init container, to be retried")
	r.WantCounts(t, id, 0, 0)
	p.WantNotEnded(t)
	other.Close()
	rig.StartAwait(t).WantExit(t, 0)
	r.WantInflight(t, id, token)
}

// A sidecar that receives no await request logs that the app may run without a token.
func TestWarningWithoutAwaitRequests(t *testing.T) {
	var b rig.Log
	d := newAwaitServer(startMark{}, "", slog.New(slog.NewJSONHandler(&b, nil)))
	d.warnNotAsked()
	d.noteAsked()
	d.warnNotAsked()
	if n := strings.Count(b.String(), "no init container asks for the token"); n != 1 {
		t.Errorf("the warning was logged %d times, want once: %s", n, b.String())
	}
}

// The mark of an earlier sandbox does not count: with hostIPC, it is still there.
func TestStartMarkOfAnotherSandbox(t *testing.T) {
	t.Parallel()
	mark := startMark{filepath.Join(t.TempDir(), "mark"), "/sandboxes/1/resolv.conf"}
	mark.set(slog.Default())
	if !mark.isSet() {
		t.Error("the mark is not set")
	}
	mark.sandbox = "/sandboxes/2/resolv.conf"
	if mark.isSet() {
		t.Error("the mark of another sandbox is set")
	}
	mark.set(slog.Default())
	if !mark.isSet() {
		t.Error("the mark is not set in the new sandbox")
	}
	mark.remove(slog.Default())
	if mark.sandbox = ""; mark.isSet() {
		t.Error("the mark is set after it was removed")
	}
}

// The root field of the mount of /etc/resolv.conf has the ID of the sandbox.
func TestSandboxOf(t *testing.T) {
	const (
		id    = "1f2e3d4c5b6a79880716253443526170a1b2c3d4e5f60718293a4b5c6d7e8f90"
		hosts = "611 601 8:1 /var/lib/kubelet/pods/0b1c/etc-hosts /etc/hosts rw,relatime - ext4 /dev/sda1 rw\n"
	)
	for name, c := range map[string]struct{ mounts, want string }{
		"containerd": {
			hosts + "614 601 8:1 /var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/" + id + "/resolv.conf " +
				"/etc/resolv.conf rw,relatime - ext4 /dev/sda1 rw\n",
			"/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/" + id + "/resolv.conf"},
		"containerd of k3s, with an optional field": {
			"614 601 259:2 /rancher/k3s/agent/containerd/io.containerd.grpc.v1.cri/sandboxes/" + id + "/resolv.conf " +
				"/etc/resolv.conf ro,relatime master:5 - xfs /dev/nvme0n1p2 rw\n" + hosts,
			"/rancher/k3s/agent/containerd/io.containerd.grpc.v1.cri/sandboxes/" + id + "/resolv.conf"},
		"CRI-O": {
			"700 690 0:25 /containers/storage/overlay-containers/" + id + "/userdata/resolv.conf " +
				"/etc/resolv.conf rw,nosuid,nodev,noexec - tmpfs tmpfs rw,seclabel,mode=755\n" + hosts,
			"/containers/storage/overlay-containers/" + id + "/userdata/resolv.conf"},
		"cri-dockerd": {
			hosts + "712 701 8:1 /var/lib/docker/containers/" + id + "/resolv.conf " +
				"/etc/resolv.conf rw,relatime - ext4 /dev/sda1 rw",
			"/var/lib/docker/containers/" + id + "/resolv.conf"},
		"no such mount": {hosts + "1 2 8:1 /etc/resolv.conf /elsewhere rw - ext4 /dev/sda1 rw\n", ""},
		"nothing":       {"", ""},
		"short lines":   {"\n1 2 3 4\n", ""},
	} {
		if got := sandboxOf(c.mounts); got != c.want {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

// The await server admits one await while it is open, then closes. It also closes by
// itself.
func TestAwaitServerAdmitsOne(t *testing.T) {
	newTestServer := func() *awaitServer {
		mark := newStartMark("pod", uuid.NewString())
		t.Cleanup(func() { os.Remove(mark.path) })
		return newAwaitServer(mark, "", slog.New(slog.DiscardHandler))
	}
	d := newTestServer()
	if d.pass() {
		t.Error("admitted an await before it was opened")
	}
	d.openUntil(time.Now().Add(time.Hour))
	if !d.pass() || d.pass() || !d.mark.isSet() {
		t.Error("did not admit exactly one await and set the start mark")
	}
	d.noteAsked()
	select {
	case <-d.asked:
	default:
		t.Error("a repeated request was not noticed")
	}
	if d.mark.isSet() {
		t.Error("the start mark stays set while an init container runs")
	}

	d = newTestServer()
	if passed, err := d.admitOne(t.Context(), time.Now().Add(10*time.Millisecond)); passed || err != nil {
		t.Errorf("without a request: admitted %t, %v", passed, err)
	}
	if d.pass() {
		t.Error("admitted an await after closing")
	}
	d.openUntil(time.Now().Add(-time.Second)) // Redis's reply was old when it was read
	if d.pass() || d.mark.isSet() {
		t.Error("admitted an await on an old reply")
	}
}

// Before the app may start, a heartbeat does not put back a lost token: another pod may
// have it.
func TestTokenLostBeforeTheAppStarts(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	rig.InPod(t, token)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1) // with a heartbeat interval of 1 s
	p.WantLog(t, heldText)
	r.MakeStale(t, id, token)
	rig.Eventually(t, 20*time.Second, func() error { // the sidecar refreshes it meanwhile
		if score := string(r.Do(t, "ZSCORE", id.inflightKey(), token).([]byte)); score == "1" {
			return errors.New("the token was not refreshed")
		}
		return nil
	})
	other := r.GiveToAnother(t, id, token)
	r.WantLine(t, id, token)
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, "waiting for a token of ")
	r.WantCounts(t, id, 0, 1)
	giveBack(t, s, id, other)
	a.WantExit(t, 0)
	r.WantLine(t, id)
	r.WantInflight(t, id, token)
}

// A repeated await request shows that the pod restarted and its app does not run. The
// sidecar then acquires its token again, and does not put it back with a heartbeat:
// another pod may have it.
func TestPodRestarted(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	rig.InPod(t, token)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1, "--heartbeat-interval-seconds=60")
	rig.StartAwait(t).WantExit(t, 0)
	other := r.GiveToAnother(t, id, token)
	a := rig.StartAwait(t)
	p.WantLog(t, "the pod is started again: its init container asks for the token")
	r.WantLine(t, id, token)
	a.WantNotEnded(t)
	giveBack(t, s, id, other)
	a.WantExit(t, 0)
}

// In a pod admitted with a token, the app starts only if the token is still in flight. If
// the token was reclaimed while the pod was Pending, the pod waits in line.
func TestAdmittedPodConfirmsItsToken(t *testing.T) {
	t.Parallel()
	r := rig.CommonRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	s, id := testSemaphores(t, r.Address), freshID()
	token := w.wantAdmitted(t, id, 1)
	rig.InPod(t, token)
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	p.WantLog(t, "holding the token")
	rig.StartAwait(t).WantExit(t, 0)
	p.Signal(t, syscall.SIGTERM)
	p.WantExit(t, 0)
	r.WantCounts(t, id, 1, 0)

	late := w.wantAdmitted(t, id, 1)
	rig.InPod(t, late)
	r.MakeStale(t, id, late)
	other := w.wantAdmitted(t, id, 1)
	p = rig.StartWaitingSidecar(t, r.Address, id, late, 1)
	r.WantLine(t, id, late)
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
	giveBack(t, s, id, other)
	a.WantExit(t, 0)
	p.WantLog(t, "holding the token")
	r.WantInflight(t, id, late)
}

// A sidecar that is killed in a running pod resumes its token. If the token was reclaimed
// meanwhile, it is counted again, and the sidecar does not wait, as the app runs.
func TestSidecarRestartedInARunningPod(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	token := uuid.NewString()
	rig.InPod(t, token)
	start := func() *rig.Process { return rig.StartWaitingSidecar(t, r.Address, id, token, 1) }
	kill := func(p *rig.Process) {
		p.Signal(t, syscall.SIGKILL)
		<-p.Done()
	}
	p := start()
	rig.StartAwait(t).WantExit(t, 0)
	kill(p)
	p = start()
	p.WantLog(t, "started again in a running pod")
	r.WantCounts(t, id, 0, 1)
	kill(p)
	r.MakeStale(t, id, token)
	acquire(t, s, id, 1)
	start().WantLog(t, "the token was not in flight (reclaimed as stale, or lost with Redis): counted again")
	r.WantCounts(t, id, 0, 2)
}

// While Redis is unreachable, the app does not start, and the init container logs why.
// When Redis is back, the app starts.
func TestSidecarStartsWithoutRedis(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	token := acquire(t, s, id, 1)
	rig.InPod(t, token)
	r.Stop()
	p := rig.StartWaitingSidecar(t, r.Address, id, token, 1)
	p.WantLog(t, "no token yet, to be retried")
	a := rig.StartAwait(t)
	a.WantLogPrefix(t, fmt.Sprintf("acquire %s: %s", id, rig.UnreachedText(r.Address)))
	rig.Must(t, r.Start())
	a.WantExit(t, 0)
}

// wantInUse waits until a token is in flight.
func wantInUse(t *testing.T, s *rig.Redis, id semaphoreID, token string) {
	t.Helper()
	rig.Eventually(t, 10*time.Second, func() error {
		if s.LastHeartbeat(t, id, token) == 0 {
			return errors.New("the token is not in flight yet")
		}
		return nil
	})
}

// holdReply starts a sidecar, which takes its token, and holds Redis's reply until
// deliver is called.
func holdReply(t *testing.T, r *rig.Redis, p *rig.Proxy, id semaphoreID, token string, start func()) (deliver func()) {
	t.Helper()
	first := p.HoldFirst(t, acquireScript.made().Hash(), false) // the reply has Redis's time only
	start()
	<-first.Held
	next := p.HoldFirst(t, acquireScript.made().Hash(), false)
	first.Deliver()
	for {
		<-next.Held
		p.Answers.Lock()
		next.Deliver()
		for end := time.Now().Add(time.Second); time.Now().Before(end); {
			if r.LastHeartbeat(t, id, token) != 0 {
				return p.Answers.Unlock
			}
		}
		next = p.HoldFirst(t, acquireScript.made().Hash(), false) // that one came late
		p.Answers.Unlock()
	}
}

// A sidecar is stopped after its token is taken and before its app starts: before it
// reads Redis's reply, before an await's request, or during it. Meanwhile the token is
// reclaimed, and another pod gets one. The app does not start before the other pod gives
// its token back.
func TestStoppedSidecarStartsNoApp(t *testing.T) {
	t.Parallel()
	const (
		beforeReply = iota
		beforeRequest
		duringRequest
	)
	for when, name := range []string{"before the reply", "before the request", "during the request"} {
		for round := range 3 {
			t.Run(fmt.Sprint(name, " ", round), func(t *testing.T) {
				t.Parallel()
				r, s, id := newSemaphore(t)
				p := rig.StartProxy(t, r.Address)
				giveBack(t, s, id, acquire(t, s, id, 1)) // loads the script
				token := uuid.NewString()
				podUID := rig.InPod(t, token)
				var sidecar *rig.Process
				start := func() { // with an interval of 1 s
					sidecar = rig.StartWaitingSidecar(t, p.Address, id, token, 1)
				}
				if when == beforeReply {
					deliver := holdReply(t, r, p, id, token, start)
					sidecar.Pause(t)
					deliver()
				} else {
					start()
					sidecar.WantLog(t, heldText)
					sidecar.Pause(t)
				}
				stopped := time.Now()
				r.MakeStale(t, id, token)
				other := acquire(t, s, id, 1)
				rig.Eventually(t, 10*time.Second, func() error { // the reply is valid for an interval
					if since := time.Since(stopped); since < 1100*time.Millisecond {
						return fmt.Errorf("stopped for %s only", since)
					}
					return nil
				})
				var await *rig.Process
				if when == duringRequest {
					await = rig.StartAwait(t)
					wantConnected(t, podUID)
				}
				sidecar.Signal(t, syscall.SIGCONT)
				if await == nil {
					await = rig.StartAwait(t)
				}
				await.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
				await.WantNotEnded(t)
				r.WantLine(t, id, token)
				r.WantInflight(t, id, other)
				giveBack(t, s, id, other)
				await.WantExit(t, 0)
				r.WantInflight(t, id, token)
			})
		}
	}
}

// wantConnected waits until an await has connected to its sidecar, accepted or not. Under
// the name of the listening socket, the kernel also lists one for each connection.
func wantConnected(t *testing.T, podUID string) {
	t.Helper()
	rig.Eventually(t, 10*time.Second, func() error {
		table, err := os.ReadFile("/proc/net/unix")
		if n := strings.Count(string(table), awaitSocket(podUID).Name); err == nil && n < 2 {
			err = fmt.Errorf("%d sockets, want 2", n)
		}
		return err
	})
}

// No process is stopped, but Redis's reply is delayed until it is older than a quarter of
// the threshold. The sidecar ignores it, as another pod may have the token.
func TestLateReplyStartsNoApp(t *testing.T) {
	t.Parallel()
	for try := 1; !lateReply(t); try++ { // the machine is loaded
		if try == 10 {
			t.Fatal("the sidecar has asked again each time before another pod had its token")
		}
	}
}

// lateReply returns false, and tests nothing, if the sidecar may ask again before another
// pod has its token.
func lateReply(t *testing.T) bool {
	r, s, id := newSemaphore(t)
	p := rig.StartProxy(t, r.Address)
	giveBack(t, s, id, acquire(t, s, id, 1))
	token := uuid.NewString()
	rig.InPod(t, token)
	await := rig.StartAwait(t)
	started := time.Now()
	deliver := holdReply(t, r, p, id, token, func() {
		// with this threshold, an attempt times out after 1 s
		rig.StartWaitingSidecar(t, p.Address, id, token, 1, "--stale-threshold-seconds=2")
	})
	sent := time.Now()
	r.MakeStale(t, id, token)
	other, _, err := s.acquire(t.Context(), id, "", 1, limit{}, 10*time.Second)
	if err != nil || time.Since(started) > time.Second {
		deliver()
		return false
	}
	rig.Eventually(t, 10*time.Second, func() error {
		if since := time.Since(sent); since < 600*time.Millisecond {
			return fmt.Errorf("the reply is only %s old", since)
		}
		return nil
	})
	deliver()
	await.WantLogPrefix(t, "waiting for a token of "+id.String()+": 1 of 1 in use, 1st in line, ")
	await.WantNotEnded(t)
	r.WantInflight(t, id, other)
	giveBack(t, s, id, other)
	await.WantExit(t, 0)
	r.WantInflight(t, id, token)
	return true
}

// The age of a delayed reply counts from its request.
func TestAgeOfAReply(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	p := rig.StartProxy(t, r.Address)
	giveBack(t, s, id, acquire(t, s, id, 1))
	waiting := semaphoresOf(t, testConfig(p.Address))
	// sets the estimate of Redis's clock
	rig.Must(t, errOf(waiting.heartbeat(context.Background(), freshID(), "x", "", "", 0, 1)))
	w := newWaiter(waiting, id, 1)
	p.Answers.Lock()
	done := make(chan time.Time, 1)
	go func() {
		asked, _, err := w.wait(context.Background())
		if err != nil {
			t.Error(err)
		}
		done <- asked
	}()
	wantInUse(t, r, id, w.token)
	taken := time.Now()
	giveBack(t, s, id, w.token) // a repair may have to wait for holders that Redis was away from
	other := acquire(t, s, id, 1)
	p.Answers.Unlock()
	if late := (<-done).Sub(taken); late > 0 {
		t.Errorf("the request counts as sent %s after Redis ran it", late)
	}
	r.WantInflight(t, id, other)
}
