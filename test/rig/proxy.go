package rig

import (
	"bytes"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Proxy stands between clients and a server, and simulates network faults.
type Proxy struct {
	Address string
	Made    atomic.Int32        // the number of connections up to now
	Answers sync.RWMutex        // while it is locked, the proxy holds replies back
	Rewrite func([]byte) []byte // changes replies; nil: see announce
	Delay   atomic.Int64        // of replies, in nanoseconds

	mu    sync.Mutex
	conns []*proxied
	down  bool
	hold  *HeldCommand
}

// proxied is a connection through a Proxy.
type proxied struct {
	client, server net.Conn
	silent         atomic.Bool
}

func (c *proxied) close() {
	c.client.Close()
	c.server.Close()
}

// HeldCommand is the first command that contains a text. The proxy holds it back.
type HeldCommand struct {
	Held    chan struct{} // closed when the proxy has the command
	Made    int32         // the proxy's connections up to then
	Deliver func()        // sends the command to the server
	Sent    chan struct{} // closed when the command is sent

	text      string
	hangUp    bool // the proxy closes the client's connection at once
	delivered chan struct{}
}

// StartProxy starts a proxy in front of a server.
func StartProxy(t testing.TB, server string) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	Must(t, err)
	p := &Proxy{Address: l.Addr().String()}
	t.Cleanup(func() {
		l.Close()
		p.Cut()
	})
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			p.Made.Add(1)
			p.connect(client, server)
		}
	}()
	return p
}

func (p *Proxy) connect(client net.Conn, server string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down {
		client.Close()
		return
	}
	upstream, err := net.Dial("tcp", server)
	if err != nil {
		client.Close()
		return
	}
	c := &proxied{client: client, server: upstream}
	p.conns = append(p.conns, c)
	go c.forward(client, func(b []byte) error { return p.toServer(c, b) })
	go c.forward(upstream, func(b []byte) error {
		p.Answers.RLock()
		defer p.Answers.RUnlock()
		time.Sleep(time.Duration(p.Delay.Load()))
		if p.Rewrite != nil {
			b = p.Rewrite(b)
		} else {
			b = announce(b, server, p.Address)
		}
		_, err := client.Write(b)
		return err
	})
}

// announce replaces the address of a Cluster node by that of its proxy.
func announce(answer []byte, server, proxy string) []byte {
	if TestQueue != ClusterQueue {
		return answer
	}
	return bytes.ReplaceAll(answer, []byte(":"+Port(server)+"\r\n"), []byte(":"+Port(proxy)+"\r\n"))
}

// forward copies data until the connection ends. From a silent connection it copies
// nothing, not even the end.
func (c *proxied) forward(from net.Conn, write func([]byte) error) {
	b := make([]byte, 1<<16)
	for {
		n, err := from.Read(b)
		if c.silent.Load() {
			if err != nil {
				return
			}
			continue
		}
		if n > 0 && write(b[:n]) != nil || err != nil {
			c.close()
			return
		}
	}
}

func (p *Proxy) toServer(c *proxied, b []byte) error {
	p.mu.Lock()
	h := p.hold
	if h != nil && bytes.Contains(b, []byte(h.text)) {
		p.hold = nil
	} else {
		h = nil
	}
	p.mu.Unlock()
	if h != nil {
		h.Made = p.Made.Load()
		close(h.Held)
		if h.hangUp {
			c.client.Close()
		}
		<-h.delivered
		defer close(h.Sent)
	}
	_, err := c.server.Write(b)
	return err
}

// HoldFirst holds back the first command that contains a text. With hangUp, the proxy
// also closes the client's connection.
func (p *Proxy) HoldFirst(t testing.TB, text string, hangUp bool) *HeldCommand {
	t.Helper()
	h := &HeldCommand{Held: make(chan struct{}), Sent: make(chan struct{}), text: text, hangUp: hangUp,
		delivered: make(chan struct{})}
	h.Deliver = sync.OnceFunc(func() { close(h.delivered) })
	t.Cleanup(h.Deliver)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold = h
	return h
}

// Silence discards all further bytes of the open connections. New connections work.
func (p *Proxy) Silence() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.silent.Store(true)
	}
}

// Cut closes all connections, including new ones, until Mend.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = true
	for _, c := range p.conns {
		c.close()
	}
	p.conns = nil
}

// Mend ends a Cut.
func (p *Proxy) Mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = false
}
