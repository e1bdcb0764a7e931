package rig

import (
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
)

// TestQueue is the kind of queue that all tests use. Empty: one server. TEST_QUEUE
// selects a primary that a Sentinel reports, or a Cluster of one node, so that tests can
// inspect it.
var TestQueue = os.Getenv("TEST_QUEUE")

// The kinds of queues.
const (
	SingleQueue   = "single"
	SentinelQueue = "sentinel"
	ClusterQueue  = "cluster"
)

// QueueAddress returns the address by which the program finds a test's server, or a proxy
// in front of it. It returns addresses with a scheme, or of other machines, unchanged.
func QueueAddress(address string) string {
	host, port, err := net.SplitHostPort(address)
	switch {
	case err != nil || host != "127.0.0.1" || TestQueue == "":
		return address
	case TestQueue == ClusterQueue:
		return "redis+cluster://" + address
	}
	sharedSentinelOnce.Do(func() { sharedSentinel, sharedSentinelErr = launchSentinel(Folder(), nil) })
	if sharedSentinelErr != nil {
		panic(sharedSentinelErr)
	}
	sharedSentinelMu.Lock()
	defer sharedSentinelMu.Unlock()
	name := "primary-" + port
	_, err = sharedSentinel.Control.Do("SENTINEL", "MONITOR", name, host, port, 1)
	if err != nil && !strings.Contains(err.Error(), "Duplicate") {
		panic(err)
	}
	_, err = sharedSentinel.Control.Do("SENTINEL", "SET", name, "auth-user", AdminUser, "auth-pass", Password)
	if err != nil {
		panic(err)
	}
	return "redis+sentinel://" + sharedSentinel.Address + "/" + name
}

// UnreachedText returns the beginning of the error about an unreachable server.
func UnreachedText(address string) string {
	if TestQueue == "" {
		return "connect to queue Redis " + address
	}
	return fmt.Sprintf("queue Redis %s: out of reach: ", QueueAddress(address))
}

// SkipUnderSentinel skips a test that counts connections or commands of one server: a
// Sentinel has its own.
func SkipUnderSentinel(t testing.TB) {
	t.Helper()
	if TestQueue == SentinelQueue {
		t.Skip("the Sentinel has connections and commands of its own")
	}
}

// IfDiscovered returns n if the program discovers its server, which takes extra
// connections. Otherwise it returns 0.
func IfDiscovered(n int) int {
	if TestQueue == "" {
		return 0
	}
	return n
}

var (
	sharedSentinel     *Redis
	sharedSentinelErr  error
	sharedSentinelOnce sync.Once
	sharedSentinelMu   sync.Mutex
)
