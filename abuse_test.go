//go:build abuse

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// The tests of this tag ("make test-abuse") misuse a webhook, as a process on two cores, while a client beside it asks for admissions as
// an API server does. They say what the webhook needed, and what became of that client.

// large posts a body of 4 MiB over a connection of its own, and reads the answer.
func (a *abused) large(ctx context.Context, path string, body []byte) {
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, a.URL+path+"?timeout=5s", bytes.NewReader(body))
	if err != nil {
		return
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		_ = sleep(ctx, 10*time.Millisecond)
		return
	}
	_, _ = io.Copy(io.Discard, response.Body)
	response.Body.Close()
}

func TestAbuseByLargeRequests(t *testing.T) {
	valid := rig.Review(t, freshID(), maxLength, func(r map[string]any) {
		r["object"].(map[string]any)["metadata"].(map[string]any)["annotations"].(map[string]any)["large"] = strings.Repeat("x", 4<<20-10000)
		r["dryRun"] = true
	})
	for name, body := range map[string][]byte{
		"a review":    valid,
		"spaces":      bytes.Repeat([]byte(" "), 4<<20),
		"nested":      bytes.Repeat([]byte("["), 4<<20),
		"many fields": append([]byte(`{"request":{"object":{`), append(bytes.Repeat([]byte(`"a":{},`), 590000), `"b":1}}}`...)...),
		"many texts":  append([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"x","namespace":"x","operation":"CREATE","kind":{"version":"v1","kind":"Pod"},"object":{"spec":{"containers":[`), append(bytes.Repeat([]byte(`{},`), 1300000), `{}]}}}}`...)...),
	} {
		for _, many := range []int{64, 256} {
			t.Run(fmt.Sprintf("%s, %d", name, many), func(t *testing.T) {
				a := startAbused(t)
				a.misuse(t, 8*time.Second, many, func(ctx context.Context, _ int) { a.large(ctx, a.path, body) })
			})
		}
	}
	t.Run("a stranger's, 256", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, 8*time.Second, 256, func(ctx context.Context, _ int) { a.large(ctx, "/mutate", valid) })
	})
}

// Connections that do nothing.
func TestAbuseByIdleConnections(t *testing.T) {
	a := startAbused(t)
	a.misuse(t, 15*time.Second, 2000, func(ctx context.Context, i int) {
		_ = sleep(ctx, time.Duration(i)*3*time.Millisecond)
		conn, err := a.dial(ctx, "h2", "http/1.1")
		if err != nil {
			return
		}
		defer conn.Close()
		defer context.AfterFunc(ctx, func() { conn.Close() })()
		_, _ = conn.Read(make([]byte, 1)) // until it is closed
		_ = sleep(ctx, time.Second)
	})
}

// Clients that are as slow as they may be.
func TestAbuseBySlowness(t *testing.T) {
	slowly := func(ctx context.Context, conn net.Conn, text string, every time.Duration) {
		for i := range len(text) {
			if _, err := io.WriteString(conn, text[i:i+1]); err != nil {
				return
			}
			if sleep(ctx, every) != nil {
				return
			}
		}
	}
	connected := func(a *abused, do func(ctx context.Context, conn net.Conn)) func(context.Context, int) {
		return func(ctx context.Context, _ int) {
			conn, err := a.dial(ctx, "http/1.1")
			if err != nil {
				_ = sleep(ctx, 100*time.Millisecond)
				return
			}
			defer conn.Close()
			do(ctx, conn)
			_ = sleep(ctx, 100*time.Millisecond)
		}
	}
	t.Run("headers", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, 10*time.Second, 600, connected(a, func(ctx context.Context, conn net.Conn) {
			slowly(ctx, conn, "POST "+a.path+" HTTP/1.1\r\nHost: webhook\r\nX: "+strings.Repeat("x", 1000), 200*time.Millisecond)
		}))
	})
	t.Run("bodies", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, 15*time.Second, 600, connected(a, func(ctx context.Context, conn net.Conn) {
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: webhook\r\nContent-Type: application/json\r\nContent-Length: 3000\r\n\r\n", a.path)
			slowly(ctx, conn, strings.Repeat(" ", 3000), 200*time.Millisecond)
		}))
	})
	t.Run("large bodies", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, 15*time.Second, 600, connected(a, func(ctx context.Context, conn net.Conn) {
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: webhook\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", a.path, 4<<20)
			_, _ = conn.Write(bytes.Repeat([]byte(" "), smallBody+1))
			slowly(ctx, conn, strings.Repeat(" ", 3000), 200*time.Millisecond)
		}))
	})
	t.Run("readers", func(t *testing.T) {
		a := startAbused(t)
		request := "POST " + a.path + " HTTP/1.1\r\nHost: webhook\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
		a.misuse(t, 15*time.Second, 600, connected(a, func(ctx context.Context, conn net.Conn) {
			_ = conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
			for ctx.Err() == nil {
				if _, err := io.WriteString(conn, strings.Repeat(request, 5)); err != nil {
					return
				}
				_ = sleep(ctx, 2*time.Second)
			}
		}))
	})
}

// frames opens an HTTP/2 connection and lets write send frames on it until ctx is done, or the webhook has had enough.
func (a *abused) frames(ctx context.Context, write func(f *http2.Framer, stream uint32) error) {
	conn, err := a.dial(ctx, "h2")
	if err != nil {
		_ = sleep(ctx, 100*time.Millisecond)
		return
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	go func() { _, _ = io.Copy(io.Discard, conn) }()
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return
	}
	out := bufio.NewWriterSize(conn, 64<<10)
	f := http2.NewFramer(out, nil)
	if f.WriteSettings() != nil {
		return
	}
	for stream := uint32(1); ctx.Err() == nil && stream < 1<<30; stream += 2 {
		if write(f, stream) != nil {
			return
		}
	}
}

// headersOf are those of a request.
func headersOf(path string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, h := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", path}, {":authority", "webhook"}, {"content-type", "application/json"}} {
		_ = e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	return b.Bytes()
}

// The floods that HTTP/2 makes possible.
func TestAbuseByHTTP2(t *testing.T) {
	headers := map[string][]byte{"known": headersOf("/mutate/" + secretA), "unknown": headersOf("/mutate")}
	floods := map[string]func(f *http2.Framer, stream uint32) error{
		"settings": func(f *http2.Framer, _ uint32) error {
			return f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(rand.N(1 << 20))})
		},
		"pings": func(f *http2.Framer, _ uint32) error { return f.WritePing(false, [8]byte{}) },
		"CONTINUATION frames": func(f *http2.Framer, stream uint32) error {
			if stream == 1 {
				return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers["known"]})
			}
			return f.WriteContinuation(1, false, bytes.Repeat([]byte{0x40, 1, 'x', 1, 'y'}, 1000))
		},
	}
	for who, h := range headers {
		floods["streams, path "+who] = func(f *http2.Framer, stream uint32) error { // bodies never come
			return f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: h, EndHeaders: true})
		}
		floods["resets, path "+who] = func(f *http2.Framer, stream uint32) error {
			if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: h, EndHeaders: true}); err != nil {
				return err
			}
			return f.WriteRSTStream(stream, http2.ErrCodeCancel)
		}
		floods["data without an end, path "+who] = func(f *http2.Framer, stream uint32) error {
			if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: h, EndHeaders: true}); err != nil {
				return err
			}
			return f.WriteData(stream, false, bytes.Repeat([]byte(" "), 600))
		}
		floods["bodies that lack a byte, path "+who] = func(f *http2.Framer, stream uint32) error {
			if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: h, EndHeaders: true}); err != nil {
				return err
			}
			if err := f.WriteData(stream, false, bytes.Repeat([]byte(" "), smallBody/2)); err != nil {
				return err
			}
			return f.WriteData(stream, false, bytes.Repeat([]byte(" "), smallBody/2-1))
		}
	}
	for name, flood := range floods {
		t.Run(name, func(t *testing.T) {
			a := startAbused(t)
			abuse := func(ctx context.Context, _ int) { a.frames(ctx, flood) }
			if !strings.HasSuffix(name, "path known") {
				a.misuse(t, 8*time.Second, 8, abuse)
				return
			}
			// Whoever has the secret may have all of the processor, but no more memory.
			ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
			defer cancel()
			var wg sync.WaitGroup
			a.overrun(ctx, &wg, 8, abuse)
			wg.Wait()
			a.wantBounded(t)
		})
	}
}

// What is no TLS, and TLS that comes to nothing.
func TestAbuseByTLS(t *testing.T) {
	t.Run("garbage", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, 8*time.Second, 64, func(ctx context.Context, i int) {
			conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", a.address)
			if err != nil {
				return
			}
			defer conn.Close()
			garbage := []byte{22, 3, 1, 0x40, 0} // the beginning of a handshake
			for range rand.N(20000) {
				garbage = append(garbage, byte(rand.N(256)))
			}
			_, _ = conn.Write(garbage[(i%2)*5:])
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			_, _ = io.Copy(io.Discard, conn)
		})
	})
	t.Run("50 handshakes a second", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, time.Minute, 50, func(ctx context.Context, _ int) {
			next := time.Now().Add(time.Second)
			if conn, err := a.dial(ctx, "h2"); err == nil {
				defer conn.Close()
			}
			_ = sleep(ctx, time.Until(next))
		})
	})
}
