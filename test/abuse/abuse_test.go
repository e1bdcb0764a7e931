// Package abuse misuses a webhook, as a process on two cores. A polite client beside it
// asks for admissions, as an API server does. The tests print the cost for the webhook
// and how long the client waited.
package abuse

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

// The webhook limits bodies of more than smallBody bytes separately, and refuses those of
// more than maxBody.
const (
	smallBody = 32 << 10
	maxBody   = 10 << 20
)

// large posts a body over a new connection, and reads the answer.
func (a *abused) large(ctx context.Context, path string, body io.Reader) {
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, a.URL+path+"?timeout=5s", body)
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
	valid := rig.Review(t, rig.FreshID(), rig.MaxLength, func(r map[string]any) {
		rig.AnnotationsOf(r)["large"] = strings.Repeat("<&>", maxBody/18-1000) // 6 bytes each in JSON
		r["dryRun"] = true
	})
	for name, body := range map[string][]byte{
		"a review":    valid,
		"spaces":      bytes.Repeat([]byte(" "), maxBody),
		"nested":      bytes.Repeat([]byte("["), maxBody),
		"many fields": []byte(`{"request":{"object":{` + strings.Repeat(`"a":{},`, 590000) + `"b":1}}}`),
		"many texts": []byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"x",` +
			`"namespace":"x","operation":"CREATE","kind":{"version":"v1","kind":"Pod"},` +
			`"object":{"spec":{"containers":[` +
			strings.Repeat(`{},`, 1300000) + `{}]}}}}`),
	} {
		for _, many := range []int{64, 256} {
			t.Run(fmt.Sprintf("%s, %d", name, many), func(t *testing.T) {
				a := startAbused(t)
				a.misuse(t, 8*time.Second, many, func(ctx context.Context, _ int) { a.large(ctx, a.path, bytes.NewReader(body)) })
			})
		}
	}
	t.Run("without the secret, 256", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, 8*time.Second, 256, func(ctx context.Context, _ int) { a.large(ctx, "/mutate", bytes.NewReader(valid)) })
	})
}

// While Redis hangs, the webhook holds as many of the largest reviews as it ever does, with
// all of their text in a field that it decodes. Their length is not announced.
func TestAbuseByLargeRequestsWhileRedisHangs(t *testing.T) {
	a := startAbused(t)
	body := rig.Review(t, rig.FreshID(), rig.MaxLength, func(r map[string]any) {
		rig.AnnotationsOf(r)["large"] = strings.Repeat("x", maxBody-10000)
	})
	a.redis.Pause(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	a.overrun(ctx, &wg, 16, func(ctx context.Context, _ int) {
		a.large(ctx, a.path, io.MultiReader(bytes.NewReader(body)))
	})
	wg.Wait()
	a.wantBounded(t)
}

// Idle connections stay open.
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
		_, _ = conn.Read(make([]byte, 1)) // until the webhook closes it
		_ = sleep(ctx, time.Second)
	})
}

// Clients send and read as slowly as the webhook allows.
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
			headers := "POST " + a.path + " HTTP/1.1\r\nHost: webhook\r\nX: " + strings.Repeat("x", 1000)
			slowly(ctx, conn, headers, 200*time.Millisecond)
		}))
	})
	t.Run("bodies", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, 15*time.Second, 600, connected(a, func(ctx context.Context, conn net.Conn) {
			_, _ = io.WriteString(conn, a.requestHeaders(3000))
			slowly(ctx, conn, strings.Repeat(" ", 3000), 200*time.Millisecond)
		}))
	})
	t.Run("large bodies", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, 15*time.Second, 600, connected(a, func(ctx context.Context, conn net.Conn) {
			_, _ = io.WriteString(conn, a.requestHeaders(maxBody))
			_, _ = conn.Write(bytes.Repeat([]byte(" "), smallBody+1))
			slowly(ctx, conn, strings.Repeat(" ", 3000), 200*time.Millisecond)
		}))
	})
	t.Run("readers", func(t *testing.T) {
		a := startAbused(t)
		request := a.requestHeaders(2) + "{}"
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

// requestHeaders returns the headers of an HTTP/1.1 request with a body of n bytes.
func (a *abused) requestHeaders(n int) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: webhook\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n",
		a.path, n)
}

// frames opens an HTTP/2 connection. write sends frames on it until ctx is done or the
// webhook closes it.
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

// headersOf returns the headers of an HTTP/2 request.
func headersOf(path string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, h := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", path}, {":authority", "webhook"},
		{"content-type", "application/json"}} {
		_ = e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	return b.Bytes()
}

// Clients flood the webhook with HTTP/2 frames.
func TestAbuseByHTTP2(t *testing.T) {
	headers := map[string][]byte{"known": headersOf("/mutate/" + secret), "unknown": headersOf("/mutate")}
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
	for path, h := range headers {
		begin := func(f *http2.Framer, stream uint32) error {
			return f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: h, EndHeaders: true})
		}
		floods["streams, path "+path] = begin // bodies never arrive
		floods["resets, path "+path] = func(f *http2.Framer, stream uint32) error {
			if err := begin(f, stream); err != nil {
				return err
			}
			return f.WriteRSTStream(stream, http2.ErrCodeCancel)
		}
		floods["data without an end, path "+path] = func(f *http2.Framer, stream uint32) error {
			if err := begin(f, stream); err != nil {
				return err
			}
			return f.WriteData(stream, false, bytes.Repeat([]byte(" "), 600))
		}
		floods["bodies that lack a byte, path "+path] = func(f *http2.Framer, stream uint32) error {
			if err := begin(f, stream); err != nil {
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
			// A caller with the secret may use all CPU, but no more memory.
			ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
			defer cancel()
			var wg sync.WaitGroup
			a.overrun(ctx, &wg, 8, abuse)
			wg.Wait()
			a.wantBounded(t)
		})
	}
}

// Clients send garbage instead of TLS, or no request after the handshake.
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
