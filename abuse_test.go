//go:build abuse

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// The tests of this tag ("make test-abuse") misuse a webhook, as a process on two cores, while a client beside it asks for admissions as
// an API server does. They say what the webhook needed, and what became of that client.

const (
	abusedMemory = 192 << 20 // resident, at most: three quarters of what its container has

	// abusedLatency is that of 99 % of the admissions beside it, at most: of the ten seconds that they have, and four times what is measured.
	// It grows with what else the two cores have to do, those who misuse the webhook among it.
	abusedLatency = time.Second
)

// abused is a webhook that is misused.
type abused struct {
	*webhookProcess
	address string
	path    string // where it serves, with the secret
}

func startAbused(t *testing.T) *abused {
	t.Helper()
	file := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(file, []byte(secretA), 0o600))
	t.Setenv("GOMAXPROCS", "2")
	limitMemoryAsDeployed(t)
	w := startWebhookProcess(t, startRedis(t).address, "--path-secret-file="+file)
	return &abused{w, strings.TrimPrefix(w.url, "https://"), "/mutate/" + secretA}
}

// dial connects to the webhook over TLS.
func (a *abused) dial(ctx context.Context, protocols ...string) (net.Conn, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: &tls.Config{InsecureSkipVerify: true, NextProtos: protocols}}
	return d.DialContext(ctx, "tcp", a.address)
}

// polite asks for admissions until ctx is done, forty a second. It has been answered once, over the connection that it goes on to use, and is a
// process of its own, both as an API server: beside those who misuse the webhook, it would wait for its turn in their process. The
// function waits for its end, and returns how long the admissions took.
func (a *abused) polite(ctx context.Context, t *testing.T) func() []time.Duration {
	t.Helper()
	deadline, _ := ctx.Deadline()
	client := newProcess(os.Args[0])
	client.Env = append(os.Environ(), politeURL+"="+a.url+a.path+"?timeout=10s", politeUntil+"="+deadline.Format(time.RFC3339Nano))
	client.Stdin = bytes.NewReader(review(t, freshID(), maxLength))
	client.start(t)
	eventually(t, 10*time.Second, func() error {
		if !strings.Contains(client.stdout.String(), "\n") {
			return errors.New("no admission was answered before the misuse")
		}
		return nil
	})
	return func() (took []time.Duration) {
		client.wantExit(t, 0)
		for line := range strings.Lines(client.stdout.String()) {
			var a politeAnswer
			must(t, json.Unmarshal([]byte(line), &a))
			if a.Failure != "" {
				t.Errorf("an admission failed after %s: %s", a.Took, a.Failure)
			}
			took = append(took, a.Took)
		}
		return took[1:]
	}
}

// The environment of the polite client's process, which has the review as its input.
const (
	politeURL   = "POLITE_URL"
	politeUntil = "POLITE_UNTIL"
)

// politeAnswer is what it says of each admission, as a line of JSON.
type politeAnswer struct {
	Took    time.Duration
	Failure string
}

func init() {
	if url := os.Getenv(politeURL); url != "" {
		if err := askPolitely(url, os.Getenv(politeUntil)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// askPolitely is the polite client.
func askPolitely(url, until string) error {
	deadline, err := time.Parse(time.RFC3339Nano, until)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 10 * time.Second}
	ask := func() error {
		response, err := client.Post(url, "application/json", bytes.NewReader(body))
		if err != nil {
			return err
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err == nil && response.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s %s", response.Status, text)
		}
		return err
	}
	for out := json.NewEncoder(os.Stdout); time.Now().Before(deadline); time.Sleep(25 * time.Millisecond) {
		start := time.Now()
		var answer politeAnswer
		if err := ask(); err != nil {
			answer.Failure = err.Error()
		}
		answer.Took = time.Since(start)
		if err := out.Encode(answer); err != nil {
			return err
		}
	}
	return nil
}

// misuse lets many do the same, again and again, for so long, and checks what that costs. All of it shares two cores: between two
// attempts of one, there is a pause.
func (a *abused) misuse(t *testing.T, lasts time.Duration, many int, abuse func(ctx context.Context, i int)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), lasts)
	defer cancel()
	var wg sync.WaitGroup
	answers := a.polite(ctx, t)
	a.overrun(ctx, &wg, many, abuse)
	wg.Wait()
	took := answers()
	if len(took) == 0 {
		t.Fatal("no admission was answered")
	}
	a.wantBounded(t)
	slices.Sort(took)
	at99 := took[len(took)*99/100]
	t.Logf("%d admissions beside it took %s in the median, %s at 99 %%, %s at worst", len(took), took[len(took)/2].Round(100*time.Microsecond), at99.Round(100*time.Microsecond), took[len(took)-1].Round(100*time.Microsecond))
	if at99 > abusedLatency {
		t.Errorf("want %s at 99 %%", abusedLatency)
	}
}

// overrun starts those who misuse it.
func (a *abused) overrun(ctx context.Context, wg *sync.WaitGroup, many int, abuse func(ctx context.Context, i int)) {
	for i := range many {
		wg.Go(func() {
			_ = sleep(ctx, rand.N(200*time.Millisecond))
			for ctx.Err() == nil {
				abuse(ctx, i)
				_ = sleep(ctx, 100*time.Millisecond)
			}
		})
	}
}

// wantBounded checks what the webhook itself needed.
func (a *abused) wantBounded(t *testing.T) {
	t.Helper()
	peak := memory(t, a.Cmd, "VmHWM") << 10
	t.Logf("at most %d MiB resident", peak>>20)
	if peak > abusedMemory {
		t.Errorf("want at most %d MiB", abusedMemory>>20)
	}
	select {
	case <-a.done:
		t.Fatalf("it ended:\n%s", a.log.String())
	default:
	}
	noise := 0
	for line := range strings.Lines(a.log.String()) {
		if !strings.Contains(line, `"msg":"admission"`) || strings.Contains(line, verdictBadRequest) {
			noise++
		}
	}
	if noise > 100 {
		t.Errorf("it has logged %d lines of what strangers do", noise)
	}
}

// large posts a body of 4 MiB over a connection of its own, and reads the answer.
func (a *abused) large(ctx context.Context, path string, body []byte) {
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, a.url+path+"?timeout=5s", bytes.NewReader(body))
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
	valid := review(t, freshID(), maxLength, func(r map[string]any) {
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
