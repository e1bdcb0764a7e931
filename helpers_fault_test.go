package main

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// shiftScript adds to all times of a semaphore.
var shiftScript = redis.NewScript(scriptKeys, `
local function shift(key, by)
  local all = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #all, 2 do
    redis.call('ZADD', key, string.format('%.0f', tonumber(all[i + 1]) + by), all[i])
  end
end
shift(KEYS[2], ARGV[1])
shift(KEYS[3], ARGV[1] * 1000000)
shift(KEYS[4], ARGV[1])
for _, field in ipairs({'created', 'touched', 'resumed', 'lost', 'asked'}) do
  local at = tonumber(redis.call('HGET', KEYS[6], field) or 0)
  if at > 0 then
    redis.call('HSET', KEYS[6], field, at + ARGV[1])
  end
end`)

// shift moves all times of a semaphore: to the past, as if nobody had reached Redis for so long, or its clock had been set forward;
// or to the future, as if its clock had been set back.
func (s *redisServer) shift(t *testing.T, id semaphoreID, by time.Duration) {
	t.Helper()
	_, err := shiftScript.Do(s.control, append(id.keys(), seconds(by))...)
	must(t, err)
}

// beating is a configuration with a short heartbeat interval; the stale threshold is longer than any test.
func beating(address string, interval time.Duration) webhookConfig {
	c := testConfig(address)
	c.heartbeatInterval = interval
	return c
}

// semaphoresOf is what a webhook, or a sidecar, of that configuration has.
func semaphoresOf(t *testing.T, c webhookConfig) *semaphores {
	t.Helper()
	s := newSemaphores(c.sharedConfig, newLocker(c.sharedConfig, lockConnections), idleConnections, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { must(t, s.close(context.Background())) })
	return s
}

// faultyProxy is between clients and a server, and does to their connections what networks do.
type faultyProxy struct {
	address string
	made    atomic.Int32        // connections
	answers sync.RWMutex        // while it is locked, answers are kept back
	rewrite func([]byte) []byte // what answers become; nil: see announce
	delay   atomic.Int64        // of answers (nanoseconds)

	mu    sync.Mutex
	conns []*proxied
	down  bool
	hold  *heldCommand
}

// proxied is a connection through a faultyProxy.
type proxied struct {
	client, server net.Conn
	silent         atomic.Bool
}

func (c *proxied) close() {
	c.client.Close()
	c.server.Close()
}

// heldCommand is the first that contains a text. It is kept back on its way to the server.
type heldCommand struct {
	text    string
	hangUp  bool          // the client is told at once that its connection is closed
	held    chan struct{} // closed when it is kept back
	deliver func()        // sends it on
	sent    chan struct{} // closed when that is done

	delivered chan struct{}
}

func startFaultyProxy(t *testing.T, server string) *faultyProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	p := &faultyProxy{address: l.Addr().String()}
	t.Cleanup(func() {
		l.Close()
		p.cut()
	})
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			p.made.Add(1)
			p.connect(client, server)
		}
	}()
	return p
}

func (p *faultyProxy) connect(client net.Conn, server string) {
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
		p.answers.RLock()
		defer p.answers.RUnlock()
		time.Sleep(time.Duration(p.delay.Load()))
		if p.rewrite != nil {
			b = p.rewrite(b)
		} else {
			b = announce(b, server, p.address)
		}
		_, err := client.Write(b)
		return err
	})
}

// announce lets the node of a Cluster name what is in front of it in place of itself.
func announce(answer []byte, server, proxy string) []byte {
	if testQueue != clusterTests {
		return answer
	}
	return bytes.ReplaceAll(answer, []byte(":"+portOf(server)+"\r\n"), []byte(":"+portOf(proxy)+"\r\n"))
}

// forward passes on what is read until the connection ends; of a silent one, not even its end.
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

func (p *faultyProxy) toServer(c *proxied, b []byte) error {
	p.mu.Lock()
	h := p.hold
	if h != nil && bytes.Contains(b, []byte(h.text)) {
		p.hold = nil
	} else {
		h = nil
	}
	p.mu.Unlock()
	if h != nil {
		close(h.held)
		if h.hangUp {
			c.client.Close()
		}
		<-h.delivered
		defer close(h.sent)
	}
	_, err := c.server.Write(b)
	return err
}

// holdFirst keeps back the first command that contains a text.
func (p *faultyProxy) holdFirst(t *testing.T, text string, hangUp bool) *heldCommand {
	t.Helper()
	h := &heldCommand{text: text, hangUp: hangUp, held: make(chan struct{}), sent: make(chan struct{}), delivered: make(chan struct{})}
	h.deliver = sync.OnceFunc(func() { close(h.delivered) })
	t.Cleanup(h.deliver)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold = h
	return h
}

// silence lets all bytes of the connections that are there vanish, from now on; new ones work.
func (p *faultyProxy) silence() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.silent.Store(true)
	}
}

// cut closes all connections, and new ones too, until mend.
func (p *faultyProxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = true
	for _, c := range p.conns {
		c.close()
	}
	p.conns = nil
}

func (p *faultyProxy) mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = false
}
