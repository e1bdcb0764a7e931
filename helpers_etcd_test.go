package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// etcdBinary builds etcd from its module, once; the go command keeps it.
var etcdBinary = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "tool", "-modfile=tools/go.mod", "-n", "go.etcd.io/etcd/server/v3").Output()
	if err != nil {
		return "", fmt.Errorf("build etcd: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
})

// etcdMember is a real etcd server.
type etcdMember struct {
	address string
	child
	control *clientv3.Client // of the test's own
}

// startEtcd starts a cluster of so many members, which elects a leader within half a second.
func startEtcd(t *testing.T, members int) []*etcdMember {
	t.Helper()
	var cluster []*etcdMember
	var peers, initial []string
	for i := range members {
		cluster = append(cluster, &etcdMember{address: freeAddress(t)})
		peers = append(peers, "http://"+freeAddress(t))
		initial = append(initial, fmt.Sprintf("m%d=%s", i, peers[i]))
	}
	for i, m := range cluster {
		m.start(t, "http://"+m.address, nil,
			"--name", fmt.Sprintf("m%d", i), "--listen-peer-urls", peers[i], "--initial-advertise-peer-urls", peers[i],
			"--initial-cluster", strings.Join(initial, ","), "--heartbeat-interval", "25", "--election-timeout", "250")
	}
	for _, m := range cluster {
		m.wait(t)
	}
	return cluster
}

// start starts the process; wait waits until it serves.
func (m *etcdMember) start(t *testing.T, url string, tlsConfig *tls.Config, args ...string) {
	t.Helper()
	binary, err := etcdBinary()
	must(t, err)
	m.cmd = exec.Command(binary, append([]string{"--data-dir", t.TempDir(), "--unsafe-no-fsync", "--log-level", "error",
		"--listen-client-urls", url, "--advertise-client-urls", url}, args...)...)
	var out bytes.Buffer
	m.cmd.Stdout, m.cmd.Stderr = &out, &out
	must(t, m.cmd.Start())
	m.control, err = clientv3.New(clientv3.Config{Endpoints: []string{url}, TLS: tlsConfig, Logger: zap.NewNop()})
	must(t, err)
	t.Cleanup(func() {
		m.control.Close()
		m.kill()
		if t.Failed() {
			t.Logf("etcd %s:\n%s", m.address, out.String())
		}
	})
}

func (m *etcdMember) kill() {
	_ = m.cmd.Process.Signal(syscall.SIGCONT)
	_ = m.cmd.Process.Kill()
	_ = m.cmd.Wait()
}

func (m *etcdMember) wait(t *testing.T) {
	t.Helper()
	eventually(t, 60*time.Second, m.answers)
}

func (m *etcdMember) answers() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := m.control.Get(ctx, "ready")
	return err
}

// isLeader tells whether the member leads its cluster.
func (m *etcdMember) isLeader(t *testing.T) bool {
	t.Helper()
	s, err := m.control.Status(context.Background(), m.address)
	must(t, err)
	return s.Leader == s.Header.MemberId
}

// leaderFirst orders the members.
func leaderFirst(t *testing.T, cluster []*etcdMember) []*etcdMember {
	t.Helper()
	var ordered []*etcdMember
	for _, m := range cluster {
		if m.isLeader(t) {
			ordered = append([]*etcdMember{m}, ordered...)
		} else {
			ordered = append(ordered, m)
		}
	}
	return ordered
}

func etcdAddresses(cluster []*etcdMember) []string {
	var addresses []string
	for _, m := range cluster {
		addresses = append(addresses, m.address)
	}
	return addresses
}

func portOf(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}
