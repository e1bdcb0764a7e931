package rig

import (
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
)

// TestQueue is the kind of queue that all tests use. Empty is one server. By TEST_QUEUE
// it is a primary that a Sentinel names, or a Cluster of one node, which a test can look
// into.
var TestQueue = os.Getenv("TEST_QUEUE")

// The kinds of queues.
const (
	SingleQueue   = "single"
	SentinelQueue = "sentinel"
	ClusterQueue  = "cluster"
)

// QueueAddress is the address by which the program finds a server of a test, or a proxy
// in front of it. An address with a scheme, or of another machine, stays as it is.
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
	return "redis+sentinel://" + sharedSentinel.Address + "/" + name
}

// UnreachedText is how the error about a server that is out of reach begins.
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

// IfDiscovered is n where the program discovers its server, which takes connections of
// its own, and else 0.
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
