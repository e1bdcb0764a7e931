package rig

import (
	"context"
	"crypto/tls"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// etcdBinary builds etcd from its module, once. The go command caches it.
var etcdBinary = sync.OnceValues(func() (string, error) {
	cmd := exec.Command("go", "tool", "-modfile="+Path("test/tools/go.mod"), "-n", "go.etcd.io/etcd/server/v3")
	cmd.Dir = Root()
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build etcd: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
})

// Etcd is a real etcd server, a member of a cluster.
type Etcd struct {
	Address string
	*Process
	Control *clientv3.Client // the test's own client
}

// EtcdProgram returns the path of etcd.
func EtcdProgram(t testing.TB) string {
	t.Helper()
	path, err := etcdBinary()
	Must(t, err)
	return path
}

// StartEtcd starts a cluster of this many members. It elects a leader within half a
// second.
func StartEtcd(t testing.TB, members int) []*Etcd {
	t.Helper()
	var cluster []*Etcd
	var peers, initial []string
	for i := range members {
		cluster = append(cluster, &Etcd{Address: FreeAddress(t)})
		peers = append(peers, "http://"+FreeAddress(t))
		initial = append(initial, fmt.Sprintf("m%d=%s", i, peers[i]))
	}
	for i, m := range cluster {
		m.Serve(t, "http://"+m.Address, nil,
			"--name", fmt.Sprintf("m%d", i), "--listen-peer-urls", peers[i], "--initial-advertise-peer-urls", peers[i],
			"--initial-cluster", strings.Join(initial, ","), "--heartbeat-interval", "25", "--election-timeout", "250")
	}
	for _, m := range cluster {
		m.WantServing(t)
	}
	return cluster
}

// Serve starts the process with these arguments.
func (m *Etcd) Serve(t testing.TB, url string, tlsConfig *tls.Config, args ...string) {
	t.Helper()
	m.Process = NewProcess(EtcdProgram(t), append([]string{"--data-dir", t.TempDir(), "--unsafe-no-fsync",
		"--log-level", "error", "--listen-client-urls", url, "--advertise-client-urls", url}, args...)...)
	m.Start(t)
	control, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, TLS: tlsConfig, Logger: zap.NewNop()})
	Must(t, err)
	m.Control = control
	t.Cleanup(func() { control.Close() })
}

// WantServing waits until the member serves.
func (m *Etcd) WantServing(t testing.TB) {
	t.Helper()
	Eventually(t, 60*time.Second, m.Answers)
}

// Answers sends the member a request, and returns its error.
func (m *Etcd) Answers() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := m.Control.Get(ctx, "ready")
	return err
}

// IsLeader reports whether the member leads its cluster.
func (m *Etcd) IsLeader(t testing.TB) bool {
	t.Helper()
	s, err := m.Control.Status(context.Background(), m.Address)
	Must(t, err)
	return s.Leader == s.Header.MemberId
}

// LeaderFirst returns the members, the leader first.
func LeaderFirst(t testing.TB, cluster []*Etcd) []*Etcd {
	t.Helper()
	var ordered []*Etcd
	for _, m := range cluster {
		if m.IsLeader(t) {
			ordered = append([]*Etcd{m}, ordered...)
		} else {
			ordered = append(ordered, m)
		}
	}
	return ordered
}

// EtcdAddresses returns the addresses of all members.
func EtcdAddresses(cluster []*Etcd) []string {
	var addresses []string
	for _, m := range cluster {
		addresses = append(addresses, m.Address)
	}
	return addresses
}
