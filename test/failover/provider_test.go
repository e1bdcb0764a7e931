package failover

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

// movingAddress is an address of a provider. The server behind it changes. Then
// connections to the old server hang.
type movingAddress struct {
	listener net.Listener
	server   *rig.Redis
	behind   chan *rig.Redis // the next server
}

func (m *movingAddress) Address() string                            { return m.listener.Addr().String() }
func (m *movingAddress) Holder(testing.TB, fmt.Stringer) *rig.Redis { return m.server }

// A provider's address moves to the replica. The old primary and its connections hang.
func TestProviderFailover(t *testing.T) {
	t.Parallel()
	primary, replica := startBare(t), startBare(t)
	replica.Do(t, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
	primary.Do(t, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
	replica.Do(t, "REPLICAOF", "127.0.0.1", rig.Port(primary.Address))
	rig.Eventually(t, 20*time.Second, func() error {
		info := string(replica.Do(t, "INFO", "replication").([]byte))
		if !strings.Contains(info, "master_link_status:up") {
			return errors.New(info)
		}
		return nil
	})
	m := startMovingAddress(t, primary)
	f := startTraffic(t, m, rig.FreshID())
	var moved time.Duration
	f.strike(t, func() {
		primary.Pause(t)
		// The provider moves the address after the first admissions have failed.
		rig.Eventually(t, patience, func() error {
			for _, a := range f.since(0) {
				if a.err != nil {
					return nil
				}
			}
			return errors.New("no admission has failed")
		})
		replica.Do(t, "REPLICAOF", "NO", "ONE")
		m.server = replica
		m.behind <- replica
		moved = time.Since(f.fault)
	})
	t.Logf("the address moved %.1f s after the fault", moved.Seconds())
	f.wantRecovered(t, moved+4*time.Second)
}

func startBare(t *testing.T) *rig.Redis {
	t.Helper()
	return rig.StartRedisWith(t, rig.RedisOptions{Bare: true})
}

func startMovingAddress(t *testing.T, first *rig.Redis) *movingAddress {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	rig.Must(t, err)
	t.Cleanup(func() { l.Close() })
	m := &movingAddress{listener: l, server: first, behind: make(chan *rig.Redis, 1)}
	go func() {
		to := first
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
	return m
}
