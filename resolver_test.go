package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// dnsAnswer is what a test lets DNS answer: by itself none.
type dnsAnswer struct {
	addresses []string
	err       error
}

// testResolver is one whose DNS answers when it is told to, as a real one does not.
func testResolver(t *testing.T) (r *resolver, asked chan string, answer chan dnsAnswer) {
	t.Helper()
	asked, answer = make(chan string, 100), make(chan dnsAnswer)
	r = newResolver()
	r.ask = func(ctx context.Context, host string) ([]string, error) {
		asked <- host
		select {
		case a := <-answer:
			return a.addresses, a.err
		case <-t.Context().Done():
			return nil, errors.New("the test is over")
		}
	}
	return r, asked, answer
}

func (r *resolver) wantKnown(t *testing.T, host string, want ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if got, err := r.resolve(ctx, host); err != nil || !slices.Equal(got, want) {
		t.Errorf("%s is at %v, %v; want %v", host, got, err, want)
	}
}

// wantKnownSoon waits until an answer has arrived.
func (r *resolver) wantKnownSoon(t *testing.T, host string, want ...string) {
	t.Helper()
	rig.Eventually(t, 5*time.Second, func() error {
		if known, _ := r.start(host); !slices.Equal(known, want) {
			return fmt.Errorf("%s is at %v, want %v", host, known, want)
		}
		return nil
	})
}

// A question that takes longer than a dial has time is not asked in vain, and not again meanwhile.
func TestResolveSlowDNS(t *testing.T) {
	t.Parallel()
	r, asked, answer := testResolver(t)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		_, err := r.resolve(ctx, "a.test")
		var dns *net.DNSError
		if !errors.As(err, &dns) || !dns.IsTimeout || dns.Name != "a.test" {
			t.Errorf("without an answer: %v", err)
		}
		cancel()
	}
	answer <- dnsAnswer{addresses: []string{"192.0.2.1"}}
	r.wantKnownSoon(t, "a.test", "192.0.2.1")
	r.wantKnown(t, "a.test", "192.0.2.1")
	if len(asked) != 1 {
		t.Errorf("DNS was asked %d times, want once", len(asked))
	}
}

// An old answer is used when there is no new one, and only then.
func TestResolveOldAnswer(t *testing.T) {
	t.Parallel()
	r, asked, answer := testResolver(t)
	go func() { answer <- dnsAnswer{addresses: []string{"192.0.2.1"}} }()
	r.wantKnown(t, "a.test", "192.0.2.1")
	r.doubt("a.test")
	r.wantKnown(t, "a.test", "192.0.2.1") // DNS is silent
	answer <- dnsAnswer{err: &net.DNSError{Err: "server misbehaving", Name: "a.test"}}
	r.wantKnown(t, "a.test", "192.0.2.1") // and then it fails
	go func() { answer <- dnsAnswer{addresses: []string{"192.0.2.2", "192.0.2.3"}} }()
	r.wantKnownSoon(t, "a.test", "192.0.2.2", "192.0.2.3")
	if len(asked) != 3 {
		t.Errorf("DNS was asked %d times, want 3", len(asked))
	}
}

func TestResolveUnknownHost(t *testing.T) {
	t.Parallel()
	r, _, answer := testResolver(t)
	go func() { answer <- dnsAnswer{err: &net.DNSError{Err: "no such host", Name: "a.test"}} }()
	_, err := r.dial(t.Context(), new(net.Dialer), "tcp", "a.test:1")
	if err == nil || !strings.Contains(err.Error(), "lookup a.test: no such host") || !isUnreachable(err) {
		t.Errorf("got %v", err)
	}
}

// The first address that answers is taken; where none does, DNS is asked again.
func TestDialResolved(t *testing.T) {
	t.Parallel()
	r, asked, answer := testResolver(t)
	_, port, _ := net.SplitHostPort(rig.StartRedis(t).Address)
	dial := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		c, err := r.dial(ctx, new(net.Dialer), "tcp", "a.test:"+port)
		if err == nil {
			c.Close()
		}
		return err
	}
	go func() { answer <- dnsAnswer{addresses: []string{"127.0.0.99"}} }() // nobody listens there
	if err := dial(); err == nil || !strings.Contains(err.Error(), "127.0.0.99:"+port) {
		t.Errorf("got %v", err)
	}
	go func() { answer <- dnsAnswer{addresses: []string{"127.0.0.99", "127.0.0.1"}} }()
	rig.Must(t, dial())
	rig.Must(t, dial())
	if len(asked) != 2 {
		t.Errorf("DNS was asked %d times, want 2", len(asked))
	}
}
