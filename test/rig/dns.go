package rig

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// DNS is a DNS server over UDP.
type DNS struct {
	Delay atomic.Int64 // of answers, in nanoseconds

	conn  net.PacketConn
	mu    sync.Mutex
	hosts map[string][]netip.Addr // by name, without the last dot
	asked map[string]int          // questions for IPv4 addresses, by name
	fault DNSFault
}

// DNSFault returns the fault of the answer to a question: an error code, or no answer at
// all. n counts the questions for the IPv4 addresses of this host up to now.
type DNSFault func(q dnsmessage.Question, n int) (code dnsmessage.RCode, lost bool)

// StartDNS starts a DNS server at an address of this machine, with port 0 at a free port.
func StartDNS(t testing.TB, address string) *DNS {
	t.Helper()
	conn, err := net.ListenPacket("udp", address)
	Must(t, err)
	t.Cleanup(func() { conn.Close() })
	d := &DNS{conn: conn, hosts: map[string][]netip.Addr{}, asked: map[string]int{}}
	go d.serve()
	return d
}

// Address returns HOST:PORT of the server.
func (d *DNS) Address() string { return d.conn.LocalAddr().String() }

// Set sets the addresses of a host.
func (d *DNS) Set(host string, addresses ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var parsed []netip.Addr
	for _, a := range addresses {
		parsed = append(parsed, netip.MustParseAddr(a))
	}
	d.hosts[host] = parsed
}

// SetFault sets the fault of later answers.
func (d *DNS) SetFault(fault DNSFault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = fault
}

// Asked returns how often the IPv4 addresses of a host were asked for.
func (d *DNS) Asked(host string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.asked[host]
}

func (d *DNS) serve() {
	for {
		packet := make([]byte, 1024)
		n, from, err := d.conn.ReadFrom(packet)
		if err != nil {
			return
		}
		go func() {
			if answer, ok := d.answer(packet[:n]); ok {
				time.Sleep(time.Duration(d.Delay.Load()))
				_, _ = d.conn.WriteTo(answer, from)
			}
		}()
	}
}

func (d *DNS) answer(packet []byte) (answer []byte, ok bool) {
	var m dnsmessage.Message
	if m.Unpack(packet) != nil || len(m.Questions) != 1 {
		return nil, false
	}
	q := m.Questions[0]
	host := strings.TrimSuffix(q.Name.String(), ".")
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	d.mu.Lock()
	if q.Type == dnsmessage.TypeA {
		d.asked[host]++
	}
	addresses, known := d.hosts[host]
	fault, n := d.fault, d.asked[host]
	d.mu.Unlock()
	if !known {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addresses {
		header := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}
		switch {
		case q.Type == dnsmessage.TypeA && a.Is4():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AResource{A: a.As4()}})
		case q.Type == dnsmessage.TypeAAAA && a.Is6():
			m.Answers = append(m.Answers,
				dnsmessage.Resource{Header: header, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	if fault != nil {
		code, lost := fault(q, n)
		if lost {
			return nil, false
		}
		if code != dnsmessage.RCodeSuccess {
			m.RCode, m.Answers = code, nil
		}
	}
	answer, err := m.Pack()
	return answer, err == nil
}

// ProgramInPod returns a program that runs the program with the resolv.conf of a pod: five
// dots, three search domains. The DNS server must be on port 53. Without the right to make a
// mount namespace, it skips the test.
func ProgramInPod(t testing.TB, d *DNS) (program string) {
	t.Helper()
	dir := t.TempDir()
	host, port, _ := net.SplitHostPort(d.Address())
	if port != "53" {
		t.Fatalf("the DNS server is at %s, not at port 53", d.Address())
	}
	conf := filepath.Join(dir, "resolv.conf")
	Must(t, os.WriteFile(conf, []byte("nameserver "+host+
		"\nsearch ns.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"), 0o600))
	program = filepath.Join(dir, "program")
	script := fmt.Sprintf(`#!/bin/sh
exec unshare -m sh -c 'mount --bind %s /etc/resolv.conf && exec "$@"' sh %s "$@"
`, conf, Program(t))
	Must(t, os.WriteFile(program, []byte(script), 0o700))
	if out, err := exec.Command(program, "--help").CombinedOutput(); err != nil {
		t.Skipf("a resolv.conf of its own needs a mount namespace: %v: %s", err, out)
	}
	return program
}
