// Package abuse misuses a webhook, as a process on two cores. A polite client beside it
// asks for admissions, as an API server does. The tests print the cost for the webhook
// and how long the client waited.
package abuse

import (
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
)

// The webhook limits bodies of more than smallBody bytes separately, and refuses those of
// more than maxBody.
const (
	smallBody = 32 << 10
	maxBody   = 10 << 20
)

// floodTime is how long a flood lasts: its memory is used up in the first seconds.
const floodTime = 5 * time.Second

// large posts a body over a new connection, and reads the answer.
func (a *abused) large(ctx context.Context, path string, body io.Reader) {
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
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
				a.misuse(t, floodTime, many, func(ctx context.Context, _ int) { a.large(ctx, a.path, bytes.NewReader(body)) })
			})
		}
	}
	t.Run("without the secret, 256", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, floodTime, 256, func(ctx context.Context, _ int) { a.large(ctx, "/mutate", bytes.NewReader(valid)) })
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
		conn, err := a.dial(ctx)
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
			conn, err := a.dial(ctx)
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

// Clients flood the webhook with requests.
func TestAbuseByFloods(t *testing.T) {
	for name, flood := range map[string]struct {
		clients      int
		first, again string // PATH stands for the path
	}{
		"requests":            {8, "", "POST PATH HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"},
		"headers without end": {8, "POST PATH HTTP/1.1\r\nHost: x\r\n", "X: y\r\n"},
		"chunks": {8, "POST PATH HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" +
			"Transfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n"},
		"bodies that lack a byte": {1500, "POST PATH HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" +
			fmt.Sprintf("Content-Length: %d\r\n\r\n", smallBody) + strings.Repeat(" ", smallBody-1), ""},
	} {
		flood.again = strings.Repeat(flood.again, 1000)
		for kind, path := range map[string]string{"known": "/mutate/" + secret, "unknown": "/mutate"} {
			t.Run(name+", path "+kind, func(t *testing.T) {
				a := startAbused(t)
				withPath := strings.NewReplacer("PATH", path)
				first, again := withPath.Replace(flood.first), withPath.Replace(flood.again)
				abuse := func(ctx context.Context, _ int) {
					conn, err := a.dial(ctx)
					if err != nil {
						return
					}
					defer conn.Close()
					defer context.AfterFunc(ctx, func() { conn.Close() })()
					_, err = io.WriteString(conn, first)
					for err == nil && again != "" {
						_, err = io.WriteString(conn, again)
					}
					_, _ = io.Copy(io.Discard, conn)
				}
				if kind == "unknown" {
					a.misuse(t, floodTime, flood.clients, abuse)
					return
				}
				// A caller with the secret may use all CPU, but no more memory.
				ctx, cancel := context.WithTimeout(context.Background(), floodTime)
				defer cancel()
				var wg sync.WaitGroup
				a.overrun(ctx, &wg, flood.clients, abuse)
				wg.Wait()
				a.wantBounded(t)
			})
		}
	}
}

// Clients send garbage instead of TLS, or no request after the handshake.
func TestAbuseByTLS(t *testing.T) {
	t.Run("garbage", func(t *testing.T) {
		a := startAbused(t)
		a.misuse(t, floodTime, 64, func(ctx context.Context, i int) {
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
		a.misuse(t, 20*time.Second, 50, func(ctx context.Context, _ int) {
			next := time.Now().Add(time.Second)
			if conn, err := a.dial(ctx); err == nil {
				defer conn.Close()
			}
			_ = sleep(ctx, time.Until(next))
		})
	})
}
