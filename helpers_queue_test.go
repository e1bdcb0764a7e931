package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// testQueue is the kind of queue that all tests use: "" for one server, or, by TEST_QUEUE, a primary that a Sentinel names or a
// Cluster (of one node, which a test can look into).
var testQueue = os.Getenv("TEST_QUEUE")

const (
	sentinelTests = "sentinel"
	clusterTests  = "cluster"
)

// foundBy is the address by which the program finds a server of a test, or what is in front of it. What is no address of this machine,
// or has a scheme, stays as it is.
func foundBy(address string) string {
	host, port, err := net.SplitHostPort(address)
	switch {
	case err != nil || host != "127.0.0.1" || testQueue == "":
		return address
	case testQueue == clusterTests:
		return "redis+cluster://" + address
	}
	sharedSentinelOnce.Do(func() { sharedSentinel, sharedSentinelErr = launchSentinel(filepath.Dir(binary)) })
	if sharedSentinelErr != nil {
		panic(sharedSentinelErr)
	}
	sharedSentinelMu.Lock()
	defer sharedSentinelMu.Unlock()
	name := "primary-" + port
	_, err = sharedSentinel.control.Do("SENTINEL", "MONITOR", name, host, port, 1)
	if err != nil && !strings.Contains(err.Error(), "Duplicate") {
		panic(err)
	}
	return "redis+sentinel://" + sharedSentinel.address + "/" + name
}

// unreachedText is how the error of a server that is out of reach begins.
func unreachedText(address string) string {
	if testQueue == "" {
		return "connect to queue Redis " + address
	}
	return "queue Redis " + foundBy(address) + ": out of reach: "
}

// forOneServer skips a test that counts what one server has to do: a Sentinel watches it, with connections and commands of its own.
func forOneServer(t *testing.T) {
	t.Helper()
	if testQueue == sentinelTests {
		t.Skip("the Sentinel has connections and commands of its own")
	}
}

// addedByLookups is n where there are look-ups, whose connections come on top.
func addedByLookups(n int) int {
	if testQueue == "" {
		return 0
	}
	return n
}

var (
	sharedSentinel     *redisServer
	sharedSentinelErr  error
	sharedSentinelOnce sync.Once
	sharedSentinelMu   sync.Mutex
)

// launchSentinel starts a Sentinel that knows of no primary yet.
func launchSentinel(dir string) (*redisServer, error) {
	var last error
	for range 5 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		l.Close()
		s := &redisServer{address: l.Addr().String(), options: []redis.DialOption{redis.DialReadTimeout(5 * time.Second)}}
		file := filepath.Join(dir, "sentinel-"+portOf(s.address)+".conf")
		var config bytes.Buffer
		fmt.Fprintf(&config, "port %s\nbind 127.0.0.1\ndir %s\n", portOf(s.address), dir)
		if err := os.WriteFile(file, config.Bytes(), 0o600); err != nil {
			return nil, err
		}
		s.args = []string{file, "--sentinel"}
		if last = s.start(); last == nil {
			return s, nil
		}
	}
	return nil, last
}

// serveAllSlots makes the server a Cluster of its own.
func (s *redisServer) serveAllSlots() error {
	if _, err := s.control.Do("CLUSTER", "ADDSLOTSRANGE", 0, clusterSlots-1); err != nil && !strings.Contains(err.Error(), "busy") {
		return err
	}
	for range 1000 { // a node does not serve for two seconds
		info, err := redis.String(s.control.Do("CLUSTER", "INFO"))
		if err != nil {
			return err
		}
		if strings.Contains(info, "cluster_state:ok") {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("the Cluster of one node does not serve")
}
