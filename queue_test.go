package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// With TEST_QUEUE, only the tests that use a queue run, on that kind of queue.
// chooseTests finds them in the source: a test uses a queue if it names rig.QueueAddress,
// or a helper that does. The tests below use a queue, are slow, and run the same on all
// kinds.
var sameOnAllQueues = map[string][]string{
	"what a script decides, on a server that works": {
		"TestConcurrentFirstAdmissions", // TestHerd has more pods, and runs on all queues
		"TestNobodyOvertakesWhilePodsArePaused",
		"TestPodsOfTwoLengths",
		"TestWatchOfALongInterval", // slow; TestDeadHoldersAndRareAdmissions runs on all queues
	},
	"what scripts and memory cost": {
		"TestAdmissionCostsTheSameForAnyLength",
		"TestCostOfALongLine",
		"TestMemoryOfGreatLengths",
		"TestMetricsOfManySemaphores",
		"TestSurveyIsBounded", // TestMetricsOfAHangingRedis runs on all queues
	},
	"lock servers that fail, with a queue that works": {
		"TestGateHoldsWithoutLocks",
		"TestLineAfterLockServersHung",
		"TestLinesWithALockServerThatHangs",
		"TestLockOnlyForRepair",
		"TestManyWebhooks",
		"TestOneLockServerDown",
		"TestPausedMaintainer",
		"TestSlowLockServerIsAskedAgain",
		"TestStallingLockServer",
		"TestTwoLockServersDown",
		"TestWaiterAndADeadLockHolder",
		"TestWaitingForALockIsCheap",
	},
	"groups and Clusters of their own": {
		"TestClusterMasterSilent",
		"TestClusterSlotHalfMoved",
		"TestClusterSlotMoving",
		"TestProviderMovesItsName",
		"TestSentinelLook",
		"TestSentinelsBehindSlowDNS",
	},
	"pods in the API server, or requests over HTTP": {
		"TestGateOfSomeNamespaces",
		"TestGateUnschedulable",
		"TestLargeRequestsWait",
	},
}

// With TEST_QUEUE, chooseTests limits the run to the tests that depend on the queue. If
// the command line names tests, it changes nothing.
func chooseTests() error {
	flag.Parse()
	if rig.TestQueue == "" || flag.Lookup("test.run").Value.String() != "" {
		return nil
	}
	names, err := queueTests()
	if err != nil {
		return err
	}
	for _, same := range sameOnAllQueues {
		names = slices.DeleteFunc(names, func(name string) bool { return slices.Contains(same, name) })
	}
	return flag.Set("test.run", "^("+strings.Join(names, "|")+")$")
}

// queueTests returns the tests of this folder that use a queue.
func queueTests() (names []string, err error) {
	uses := map[string][]string{} // the names used by each function
	for pattern, prefix := range map[string]string{"*_test.go": "", "test/rig/*.go": "rig."} {
		files, err := filepath.Glob(rig.Path(pattern))
		if err != nil {
			return nil, err
		}
		for _, name := range files {
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
			if err != nil {
				return nil, err
			}
			for _, d := range file.Decls {
				if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil {
					uses[prefix+f.Name.Name] = namesIn(f, prefix)
				}
			}
		}
	}
	seen := map[string]bool{}
	var reaches func(name string) bool
	reaches = func(name string) bool {
		if name == "rig.QueueAddress" {
			return true
		}
		if seen[name] {
			return false
		}
		seen[name] = true
		return slices.ContainsFunc(uses[name], reaches)
	}
	for name := range uses {
		clear(seen)
		if strings.HasPrefix(name, "Test") && reaches(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// namesIn returns the names that a piece of source uses, with "rig." before those of
// test/rig. prefix is put before names of its own package. Fields and methods are left
// out.
func namesIn(source ast.Node, prefix string) (names []string) {
	ast.Inspect(source, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			if of, ok := n.X.(*ast.Ident); ok && of.Name == "rig" {
				names = append(names, "rig."+n.Sel.Name)
			} else {
				names = append(names, namesIn(n.X, prefix)...)
			}
			return false
		case *ast.Ident:
			names = append(names, prefix+n.Name)
		}
		return true
	})
	return names
}

// Each name in sameOnAllQueues is a test that uses a queue.
func TestSameOnAllQueues(t *testing.T) {
	t.Parallel()
	names, err := queueTests()
	rig.Must(t, err)
	for _, same := range sameOnAllQueues {
		for _, name := range same {
			if !slices.Contains(names, name) {
				t.Errorf("%s is not a test that uses a queue", name)
			}
		}
	}
	for _, name := range []string{"TestGate", "TestSidecarBeats", "TestRedisUnreachable"} {
		if !slices.Contains(names, name) {
			t.Errorf("%s uses a queue, but was not found", name)
		}
	}
	if slices.Contains(names, "TestFlagDefaults") {
		t.Error("TestFlagDefaults uses no queue, but was found")
	}
}

// groupConfig returns a configuration with a group as queue, and its own lock server.
func groupConfig(t *testing.T, address string) webhookConfig {
	t.Helper()
	c := configWithInterval(address, 2*time.Second)
	c.redisAddresses = []string{rig.StartRedis(t).Address}
	return c
}

// The program computes the same slots as Redis. It checks a Cluster by semaphores of
// which each third of the slots has one.
func TestSlots(t *testing.T) {
	t.Parallel()
	r := rig.StartRedisWith(t, rig.RedisOptions{Kind: rig.ClusterQueue})
	for range 100 {
		id := semaphoreID{"shop", uuid.NewString()}
		if got, err := redis.Int(r.Control.Do("CLUSTER", "KEYSLOT", id.queueKey())); err != nil || got != id.slot() {
			t.Errorf("%s: slot %d, want %d, %v", id, id.slot(), got, err)
		}
	}
	thirds := map[int]bool{}
	for _, id := range (&clusterQueue{}).checks() {
		thirds[id.slot()/(clusterSlots/3+1)] = true
	}
	if len(thirds) != 3 {
		t.Errorf("thirds %v", thirds)
	}
}

// While a master of a Cluster and its replica are silent, the semaphores of other masters
// go on.
func TestClusterMasterSilent(t *testing.T) {
	t.Parallel()
	c := rig.StartCluster(t)
	s := semaphoresOf(t, groupConfig(t, c.Address()))
	silent := freshID()
	old, other := c.Holder(t, silent), newSemaphoreID("shop", c.OtherID(t, silent).Key)
	acquire(t, s, other, 2) // its repair needs the lock; later tokens do not
	c.ReplicaOf(t, old).Pause(t)
	old.Pause(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, _, err := s.acquire(ctx, silent, "", 1, limit{}, 0)
		done <- err
	}()
	q := s.queue.(*clusterQueue)
	rig.Eventually(t, 20*time.Second, func() error {
		if len(q.doubtedMasters([]slotRange{{address: old.Address}})) == 0 {
			return fmt.Errorf("no command has failed at %s", old.Address)
		}
		return nil
	})
	if _, _, err := s.acquire(ctx, other, "", 2, limit{}, 0); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("a silent master gave a token")
	}
}

// A script runs while half of its semaphore's keys have moved to another node. The script
// empties one of the keys.
func TestClusterSlotHalfMoved(t *testing.T) {
	t.Parallel()
	c := rig.StartCluster(t)
	s := semaphoresOf(t, groupConfig(t, c.Address()))
	id := freshID()
	tokens := []string{acquire(t, s, id, 3), acquire(t, s, id, 3)}
	from, to := c.Holder(t, id), c.Holder(t, c.OtherID(t, id))
	name := func(n *rig.Redis) string { return string(n.Do(t, "CLUSTER", "MYID").([]byte)) }
	to.Do(t, "CLUSTER", "SETSLOT", id.slot(), "IMPORTING", name(from))
	from.Do(t, "CLUSTER", "SETSLOT", id.slot(), "MIGRATING", name(to))
	move := func(key string) {
		from.Do(t, "MIGRATE", "127.0.0.1", rig.Port(to.Address), key, 0, 5000)
	}
	done := make(chan error, 1)
	ask := func() {
		token, _, err := s.acquire(context.Background(), id, "", 3, limit{}, time.Second)
		tokens = append(tokens, token)
		done <- err
	}
	go ask()
	move(id.queueKey())
	move(id.stateKey())
	move(id.inflightKey())
	for _, n := range []*rig.Redis{to, from} {
		n.Do(t, "CLUSTER", "SETSLOT", id.slot(), "NODE", name(to))
	}
	wantDone(t, done)
	to.WantInflight(t, id, tokens...)
	wantFullError(t, s, id, 3, 3)
	for _, token := range tokens {
		giveBack(t, s, id, token)
	}
	to.WantCounts(t, id, 3, 0)
}

// All keys of a semaphore have moved, but its slot has not. The old node redirects the
// program, and the new node replies only after ASKING. The user has only the rules of
// docs/security.md.
func TestClusterSlotMoving(t *testing.T) {
	t.Parallel()
	c := rig.StartCluster(t)
	user := append([]string{"SETUSER", "sidecar", "on", ">" + rig.Password},
		strings.Fields(rig.Ageless(rig.SidecarACL)+" "+rig.ClusterACL)...)
	for _, n := range c.Nodes {
		n.Do(t, "ACL", rig.Anys(user)...)
	}
	config := groupConfig(t, c.Address())
	config.redis = redisSettings{username: "sidecar", password: rig.Password}
	locks := newRedlock(config.redisAddresses, redisSettings{}, 1)
	s := newSemaphores(config.settings, locks, 1, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { rig.Must(t, s.close(context.Background())) })
	id := freshID()
	// Pods of length 3 come and go while a pod of length 1 waits, so that all keys exist.
	holder := acquire(t, s, id, 3)
	gone := acquire(t, s, id, 3)
	a, err := s.runAcquire(t.Context(), id, acquireRequest{token: uuid.NewString(), length: 1, arrival: joinLine})
	if err != nil || a.status != acquireFull {
		t.Fatalf("got %+v, %v, want a place in line", a, err)
	}
	giveBack(t, s, id, gone)
	from, to := c.Holder(t, id), c.Holder(t, c.OtherID(t, id))
	name := func(n *rig.Redis) string { return string(n.Do(t, "CLUSTER", "MYID").([]byte)) }
	to.Do(t, "CLUSTER", "SETSLOT", id.slot(), "IMPORTING", name(from))
	from.Do(t, "CLUSTER", "SETSLOT", id.slot(), "MIGRATING", name(to))
	for _, key := range id.keys() {
		if answer := from.Do(t, "MIGRATE", "127.0.0.1", rig.Port(to.Address), key, 0, 5000); answer != "OK" {
			t.Fatalf("%s was not moved: %v", key, answer)
		}
	}
	// The node that takes the slot over has lost the scripts; a webhook loads them.
	to.Do(t, "SCRIPT", "FLUSH")
	semaphoresOf(t, groupConfig(t, c.Address())).keepScripts()
	taken := acquire(t, s, id, 3)
	for _, rule := range strings.Fields(rig.ClusterACL) {
		for _, n := range c.Nodes {
			n.Do(t, "ACL", "SETUSER", "sidecar", "-"+rule[1:])
		}
		fresh := newSemaphores(config.settings, nil, 1, slog.New(slog.DiscardHandler))
		if rule == "+role" {
			fresh.queue.(*clusterQueue).suspect[from.Address] = true
		}
		rig.Eventually(t, 20*time.Second, func() error { // on a loaded machine, a look-up may take too long
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			_, err := fresh.heartbeat(ctx, id, holder, "", "", 0, 1)
			if err == nil || !strings.Contains(err.Error(), "NOPERM") {
				return fmt.Errorf("without %s: got %v, want NOPERM", rule, err)
			}
			return nil
		})
		rig.Must(t, fresh.queue.close())
		for _, n := range c.Nodes {
			n.Do(t, "ACL", "SETUSER", "sidecar", rule)
		}
	}
	for _, n := range []*rig.Redis{to, from} {
		n.Do(t, "CLUSTER", "SETSLOT", id.slot(), "NODE", name(to))
	}
	to.WantInflight(t, id, holder, taken)
	if _, err := s.heartbeat(t.Context(), id, taken, "", "", 0, 1); err != nil {
		t.Error(err)
	}
}

// "status --watch" only reads. It finds a new primary too.
func TestSentinelLook(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	id := freshID()
	acquire(t, semaphoresOf(t, groupConfig(t, g.Address())), id, 3)
	shared := groupConfig(t, g.Address()).settings
	s := newSemaphores(shared, nil, 1, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { rig.Must(t, s.queue.close()) })
	look := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		d, err := s.inspect(ctx, id, detailMost)
		if err == nil && d.inUse != 1 {
			err = fmt.Errorf("%d in use, want 1", d.inUse)
		}
		return err
	}
	rig.Eventually(t, 20*time.Second, look)
	// A process that found its primary long ago asks no Sentinels.
	s.queue.(*sentinelQueue).checked = time.Now().Add(-time.Hour)
	g.Servers[0].Crash(t)
	rig.Eventually(t, 20*time.Second, look)
}

// DNS replies once, too late for the lookup of the Sentinels, then never again. The
// program still finds the Sentinels, and the next primary.
func TestSentinelsBehindSlowDNS(t *testing.T) {
	t.Parallel()
	g := rig.StartSentinelGroup(t)
	s := semaphoresOf(t, groupConfig(t, strings.ReplaceAll(g.Address(), "127.0.0.1", "sentinel.test")))
	r, _, replies := testResolver(t)
	s.queue.(*sentinelQueue).settings.resolver = r
	go func() {
		_ = sleep(t.Context(), 2*requeryAfter)
		replies <- dnsReply{addresses: []string{"127.0.0.1"}}
	}()
	id := freshID()
	acquire(t, s, id, maxLength)
	r.expire("sentinel.test")
	g.Servers[0].Crash(t)
	rig.Eventually(t, 20*time.Second, func() error { // a second election may take longer than one acquire
		_, _, err := s.acquire(t.Context(), id, "", maxLength, limit{}, 10*time.Second)
		return err
	})
}

// connectionsMade counts the connections that Redis has accepted so far.
func connectionsMade(t *testing.T, r *rig.Redis) int {
	t.Helper()
	return r.Info(t, "stats", "total_connections_received:")
}

// While Redis runs a long script of another client, or accepts no more connections, an
// admission waits, as for a Redis that is away. The metric names the reason.
func TestRedisServesNobodyForAMoment(t *testing.T) {
	t.Parallel()
	for kind, begin := range map[string]func(t *testing.T, r *rig.Redis) (end func()){
		"BUSY": func(t *testing.T, r *rig.Redis) func() {
			r.Do(t, "CONFIG", "SET", "busy-reply-threshold", "10")
			other := r.Dial(t)
			t.Cleanup(func() { other.Close() })
			rig.Must(t, other.Send("EVAL", "while true do end", 0))
			rig.Must(t, other.Flush())
			return func() { rig.Must(t, errOf(r.Control.Do("SCRIPT", "KILL"))) }
		},
		kindMaxClients: func(t *testing.T, r *rig.Redis) func() {
			before, err := redis.Strings(r.Do(t, "CONFIG", "GET", "maxclients"), nil)
			rig.Must(t, err)
			r.Do(t, "CONFIG", "SET", "maxclients", r.Info(t, "clients", "connected_clients:"))
			return func() { r.Do(t, "CONFIG", "SET", "maxclients", before[1]) }
		},
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			r := rig.StartRedis(t)
			w, id := startWebhook(t, testConfig(r.Address)), freshID()
			end := begin(t, r)
			type result struct {
				admission rig.Admission
				err       error
			}
			done := make(chan result, 1)
			body := rig.Review(t, id, 1)
			go func() {
				status, text, err := w.post(context.Background(), body, "30s")
				if err != nil {
					done <- result{err: err}
					return
				}
				a, err := rig.ReadAdmission(status, text)
				done <- result{a, err}
			}()
			name := fmt.Sprintf("%sredis_errors_total{kind=%q}", metricsPrefix, kind)
			rig.Eventually(t, 10*time.Second, func() error {
				if n := w.samples(t)[name]; n < 2 {
					return fmt.Errorf("%v errors are counted", n)
				}
				return nil
			})
			end()
			if got := <-done; got.err != nil || !got.admission.Allowed {
				t.Errorf("got %+v, want the pod to be admitted", got)
			}
		})
	}
}

// A Redis that refuses commands and serves on keeps its connections.
func TestRefusedCommandsKeepTheirConnection(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphoreOn(t, rig.StartRedis(t))
	giveBack(t, s, id, acquire(t, s, id, 1))
	r.Fill(t)
	before := connectionsMade(t, r)
	for range 50 {
		if _, _, err := s.acquire(t.Context(), id, "", 1, limit{}, time.Second); err == nil || !strings.Contains(err.Error(), "OOM") {
			t.Fatalf("got %v, want OOM", err)
		}
	}
	if n := connectionsMade(t, r) - before; n > 5 {
		t.Errorf("50 refused admissions made %d connections", n)
	}
}

// A side question that got no answer in its short time says nothing of the other
// connections.
func TestSideQuestionKeepsConnections(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	p := rig.StartProxy(t, r.Address)
	w, id := startWebhook(t, testConfig(p.Address)), freshID()
	w.wantAdmitted(t, id, 5)
	connectAll(t, w, 8)
	ctx, cancel := context.WithTimeout(t.Context(), silentAfter/10)
	defer cancel()
	p.Answers.Lock()
	_, err := runCommand(ctx, w.semaphores.queue, "EXISTS", pulseKey)
	p.Answers.Unlock()
	if err == nil {
		t.Fatal("a side question was answered by a proxy that holds all answers")
	}
	w.wantAdmitted(t, id, 5)
	if idle := serverOf(t, w.semaphores, id).pool.IdleCount(); idle < 7 { // one was in use
		t.Errorf("%d of 8 idle connections are left", idle)
	}
}

// answering is a connection to a server with fixed replies.
type answering struct {
	net.Conn
	io.Reader
}

func (a answering) Read(b []byte) (int, error)         { return a.Reader.Read(b) }
func (answering) Write(b []byte) (int, error)          { return len(b), nil }
func (answering) Close() error                         { return nil }
func (answering) SetDeadline(time.Time) error          { return nil }
func (a answering) SetReadDeadline(t time.Time) error  { return nil }
func (a answering) SetWriteDeadline(t time.Time) error { return nil }

// Any reply of Redis, to scripts and to a survey, is parsed or gives an error.
func FuzzAnswers(f *testing.F) {
	for _, text := range []string{
		"*3\r\n:1\r\n:1700000000000000\r\n:3\r\n",
		"*3\r\n:2\r\n:1700000000000000\r\n:1\r\n",
		"*6\r\n:0\r\n:1700000000000000\r\n:3\r\n:0\r\n:0\r\n*2\r\n:5\r\n$5\r\nweb-1\r\n",
		"*11\r\n:0\r\n:1700000000000000\r\n:3\r\n:2\r\n:9\r\n*0\r\n:2\r\n" +
			"$16\r\n1700000000000000\r\n:41\r\n:7\r\n:1\r\n",
		"*2\r\n$10\r\n1700000000\r\n$6\r\n123456\r\n" +
			"*8\r\n:1\r\n:2\r\n:0\r\n:0\r\n*2\r\n$1\r\na\r\n$10\r\n1700000000\r\n:0\r\n*0\r\n*3\r\n$1\r\n3\r\n$-1\r\n$-1\r\n",
		"-MOVED 1 127.0.0.1:7000\r\n", "$-1\r\n", "*-1\r\n", "+OK\r\n",
	} {
		f.Add([]byte(text))
	}
	ctx := context.Background()
	// redigo allocates as much as Redis announces.
	huge := regexp.MustCompile(`[*$]\d{7}`)
	f.Fuzz(func(t *testing.T, data []byte) {
		if huge.Match(data) {
			t.Skip()
		}
		dial := func() redis.Conn {
			return redis.NewConn(answering{Reader: bytes.NewReader(data)}, time.Second, time.Second)
		}
		if values, err := redis.Values(dial().Do("EVALSHA")); err == nil {
			var status int
			var micros int64
			if rest, err := redis.Scan(values, &status, &micros); err == nil {
				if a, err := parseReply(status, rest); err == nil {
					_ = waitingText(testID, 3, 1, waitEnd{}, a)
					_ = refusal(&fullError{testID, 3, a.occupancy})
				}
			}
		}
		s := newSemaphores(testConfig("127.0.0.1:1").settings, nil, 1, slog.New(slog.DiscardHandler))
		states, _ := s.readStates(ctx, dial(), []semaphoreID{testID})
		var d semaphoreDetail
		d.id = testID
		_ = s.readTokens(ctx, dial(), &d, detailMost)
		var page strings.Builder
		printTable(&page, states, "")
		printDetail(&page, d)
		rig.Must(t, printJSON(&page, d.report()))
		if strings.Contains(page.String(), "\x1b") {
			t.Errorf("status prints unprintable text: %q", page.String())
		}
		_, _ = readSlots("127.0.0.1:1", first(dial().Do("CLUSTER", "SLOTS")))
	})
}

func first(reply any, _ error) any { return reply }
