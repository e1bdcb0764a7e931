//go:build failover

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The tests of this tag let servers fail under load, each with servers of its own: "make test-queues". Those of Sentinel groups and
// Clusters are in sentinel_test.go and cluster_test.go.

// movingAddress is an address of a provider: what is behind it changes, and connections to what was there hang.
type movingAddress struct {
	listener net.Listener
	server   *rig.Redis
	behind   chan *rig.Redis
}

func (m *movingAddress) Address() string                            { return m.listener.Addr().String() }
func (m *movingAddress) Holder(testing.TB, fmt.Stringer) *rig.Redis { return m.server }

// A provider's address moves to the replica: the old primary hangs, and connections with it.
func TestProviderFailover(t *testing.T) {
	t.Parallel()
	primary, replica := rig.StartRedis(t), rig.StartRedis(t)
	replica.Do(t, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
	primary.Do(t, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
	replica.Do(t, "REPLICAOF", "127.0.0.1", rig.Port(primary.Address))
	rig.Eventually(t, 20*time.Second, func() error {
		if info := string(replica.Do(t, "INFO", "replication").([]byte)); !strings.Contains(info, "master_link_status:up") {
			return errors.New(info)
		}
		return nil
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	rig.Must(t, err)
	t.Cleanup(func() { l.Close() })
	m := &movingAddress{listener: l, server: primary, behind: make(chan *rig.Redis, 1)}
	go func() {
		to := primary
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			select {
			case to = <-m.behind:
			default:
			}
			address := to.Address
			go func() {
				defer client.Close()
				server, err := net.Dial("tcp", address)
				if err != nil {
					return
				}
				defer server.Close()
				go func() { _, _ = io.Copy(server, client) }()
				_, _ = io.Copy(client, server)
			}()
		}
	}()
	f := startTraffic(t, m, freshID())
	f.strike(func() {
		primary.Pause(t)
		time.Sleep(time.Second) // the provider takes so long
		replica.Do(t, "REPLICAOF", "NO", "ONE")
		m.server = replica
		m.behind <- replica
	})
	f.wantRecovered(t, 5*time.Second)
}
