package main

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

const (
	// resolvedFor is for how long an answer of DNS is taken for new.
	resolvedFor = 10 * time.Second

	// resolveGrace is how long a dial waits for a new answer where it has an old one.
	resolveGrace = 200 * time.Millisecond

	// resolveTimeout bounds a question to DNS. The system's resolver asks again after five seconds.
	resolveTimeout = 15 * time.Second
)

// resolver asks DNS beside the dials that need its answers, and remembers them: DNS may be slow just when a node is lost, slower than
// a dial has time, and what it answered before is mostly still right.
type resolver struct {
	ask func(ctx context.Context, host string) ([]string, error)

	mu    sync.Mutex
	hosts map[string]*resolvedHost
}

// resolvedHost is what DNS has answered for a name.
type resolvedHost struct {
	addresses []string // the last that it answered; nil: none yet
	at        time.Time
	asking    *dnsQuestion // nil: nobody asks
}

// dnsQuestion is one that is under way.
type dnsQuestion struct {
	done      chan struct{}
	addresses []string
	err       error
}

func newResolver() *resolver {
	return &resolver{ask: net.DefaultResolver.LookupHost, hosts: map[string]*resolvedHost{}}
}

// resolve returns the addresses of a host, and an error where none has been known before ctx is done.
func (r *resolver) resolve(ctx context.Context, host string) ([]string, error) {
	if net.ParseIP(host) != nil {
		return []string{host}, nil
	}
	known, asked := r.start(host)
	if asked == nil {
		return known, nil
	}
	var grace <-chan time.Time
	if known != nil {
		grace = time.After(resolveGrace)
	}
	select {
	case <-asked.done:
		if asked.err == nil || known == nil {
			return asked.addresses, asked.err
		}
	case <-grace:
	case <-ctx.Done():
		if known == nil {
			return nil, &net.DNSError{Err: "no answer yet", Name: host, IsTimeout: true}
		}
	}
	return known, nil
}

// start returns what is known of a host, and the question under way where that is old.
func (r *resolver) start(host string) (known []string, asked *dnsQuestion) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.hosts[host]
	if h == nil {
		h = new(resolvedHost)
		r.hosts[host] = h
	}
	if h.addresses != nil && time.Since(h.at) < resolvedFor {
		return h.addresses, nil
	}
	if h.asking == nil {
		h.asking = &dnsQuestion{done: make(chan struct{})}
		go r.answer(host, h, h.asking)
	}
	return h.addresses, h.asking
}

// answer gets and keeps the answer to a question.
func (r *resolver) answer(host string, h *resolvedHost, q *dnsQuestion) {
	ctx, cancel := context.WithTimeout(context.Background(), resolveTimeout)
	defer cancel()
	q.addresses, q.err = r.ask(ctx, host)
	r.mu.Lock()
	defer r.mu.Unlock()
	if q.err == nil {
		h.addresses, h.at = q.addresses, time.Now()
	}
	h.asking = nil
	close(q.done)
}

// doubt makes an answer old: who is to be found there does not answer.
func (r *resolver) doubt(host string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.hosts[host]; h != nil {
		h.at = time.Time{}
	}
}

// dial connects to the first of a host's addresses that answers. Without a resolver, the dialer asks DNS.
func (r *resolver) dial(ctx context.Context, dialer *net.Dialer, network, address string) (net.Conn, error) {
	if r == nil {
		return dialer.DialContext(ctx, network, address)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	addresses, err := r.resolve(ctx, host)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err} // as a dialer does
	}
	var failed []error
	for i, a := range addresses {
		c, err := dialWithin(ctx, dialer, network, net.JoinHostPort(a, port), len(addresses)-i)
		if err == nil {
			return c, nil
		}
		failed = append(failed, err)
	}
	r.doubt(host)
	return nil, errors.Join(failed...)
}

// dialWithin gives a dial its share of the time that is left for several.
func dialWithin(ctx context.Context, dialer *net.Dialer, network, address string, several int) (net.Conn, error) {
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/time.Duration(several))
		defer cancel()
	}
	return dialer.DialContext(ctx, network, address)
}
