//go:build abuse

package main

import (
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

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	abusedMemory = 192 << 20 // resident, at most: three quarters of what its container has

	// abusedLatency is that of 99 % of the admissions beside it, at most: of the ten seconds that they have, and four times what is measured.
	// It grows with what else the two cores have to do, those who misuse the webhook among it.
	abusedLatency = time.Second
)

// abused is a webhook that is misused.
type abused struct {
	*rig.Webhook
	address string
	path    string // where it serves, with the secret
}

func startAbused(t *testing.T) *abused {
	t.Helper()
	file := filepath.Join(t.TempDir(), "secret")
	rig.Must(t, os.WriteFile(file, []byte(secretA), 0o600))
	t.Setenv("GOMAXPROCS", "2")
	rig.LimitMemoryAsDeployed(t)
	w := rig.StartWebhook(t, rig.StartRedis(t).Address, "--path-secret-file="+file)
	return &abused{w, strings.TrimPrefix(w.URL, "https://"), "/mutate/" + secretA}
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
	client := rig.NewProcess(os.Args[0])
	client.Cmd.Env = append(os.Environ(), politeURL+"="+a.URL+a.path+"?timeout=10s", politeUntil+"="+deadline.Format(time.RFC3339Nano))
	client.Cmd.Stdin = bytes.NewReader(rig.Review(t, freshID(), maxLength))
	client.Start(t)
	rig.Eventually(t, 10*time.Second, func() error {
		if !strings.Contains(client.Stdout.String(), "\n") {
			return errors.New("no admission was answered before the misuse")
		}
		return nil
	})
	return func() (took []time.Duration) {
		client.WantExit(t, 0)
		for line := range strings.Lines(client.Stdout.String()) {
			var a politeAnswer
			rig.Must(t, json.Unmarshal([]byte(line), &a))
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
	peak := a.Memory(t, "VmHWM") << 10
	t.Logf("at most %d MiB resident", peak>>20)
	if peak > abusedMemory {
		t.Errorf("want at most %d MiB", abusedMemory>>20)
	}
	select {
	case <-a.Done():
		t.Fatalf("it ended:\n%s", a.Log.String())
	default:
	}
	noise := 0
	for line := range strings.Lines(a.Log.String()) {
		if !strings.Contains(line, `"msg":"admission"`) || strings.Contains(line, verdictBadRequest) {
			noise++
		}
	}
	if noise > 100 {
		t.Errorf("it has logged %d lines of what strangers do", noise)
	}
}
