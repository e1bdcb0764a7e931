package main

import (
	"bytes"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// establishedTo counts the established connections to a server.
func establishedTo(address string) (int, error) {
	return countConnections(address, func(state string) bool { return state == "01" })
}

func countConnections(address string, counts func(state string) bool) (int, error) {
	table, err := os.ReadFile("/proc/net/tcp")
	n := 0
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[1], tableAddress(address)) && counts(f[3]) {
			n++
		}
	}
	return n, err
}

// holdingProxy forwards connections to a server, but keeps back what a client sends from the first time on that it
// contains a text.
type holdingProxy struct {
	address string
	held    chan struct{} // closed when something is kept back
	release func()
	clients atomic.Int32 // connections that were made
}

func startHoldingProxy(t *testing.T, server, text string) *holdingProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	released := make(chan struct{})
	p := &holdingProxy{address: l.Addr().String(), held: make(chan struct{}), release: sync.OnceFunc(func() { close(released) })}
	t.Cleanup(p.release)
	hold := sync.OnceFunc(func() { close(p.held) })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			p.clients.Add(1)
			upstream, err := net.Dial("tcp", server)
			if err != nil {
				client.Close()
				continue
			}
			go func() {
				_, _ = io.Copy(client, upstream)
				client.Close()
			}()
			go func() {
				defer upstream.Close()
				b := make([]byte, 1<<16)
				for {
					n, err := client.Read(b)
					if bytes.Contains(b[:n], []byte(text)) {
						hold()
						<-released
					}
					if n > 0 {
						if _, err := upstream.Write(b[:n]); err != nil {
							return
						}
					}
					if err != nil {
						return
					}
				}
			}()
		}
	}()
	return p
}
