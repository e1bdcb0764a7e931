package abuse

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
	// maxMemory limits the resident memory to three quarters of the container's limit.
	maxMemory = 192 << 20

	// At most 1 % of the polite client's admissions may take longer than maxLatency, four
	// times the measured value. If other processes use the cores, too, the webhook's
	// stretch exceeds usualStretch. Then the limit grows by the same factor.
	maxLatency   = time.Second
	usualStretch = 4

	maxLogLines = 100 // log lines about misuse
)

// Environment variables of the polite client, which runs this test binary. It reads the
// review from stdin.
const (
	politeURL   = "POLITE_URL"
	politeUntil = "POLITE_UNTIL"
)

func TestMain(m *testing.M) {
	url := os.Getenv(politeURL)
	if url == "" {
		rig.Main(m, "make test-abuse")
	}
	if err := askPolitely(url, os.Getenv(politeUntil)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// politeAnswer is the JSON line that the polite client prints for each admission.
type politeAnswer struct {
	Took    time.Duration
	Failure string
}

// askPolitely is the polite client. It asks for an admission forty times a second.
func askPolitely(url, until string) error {
	deadline, err := time.Parse(time.RFC3339Nano, until)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
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
	for out := json.NewEncoder(os.Stdout); time.Now().Before(deadline); <-time.After(25 * time.Millisecond) {
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

// abused is a webhook under misuse.
type abused struct {
	*rig.Webhook
	redis   *rig.Redis
	address string
	path    string // the path of the webhook, with the secret
}

// secret is the secret in the path of the webhook.
var secret = strings.Repeat("a", 40)

func startAbused(t *testing.T) *abused {
	t.Helper()
	file := filepath.Join(t.TempDir(), "secret")
	rig.Must(t, os.WriteFile(file, []byte(secret), 0o600))
	t.Setenv("GOMAXPROCS", "2")
	rig.LimitMemoryAsDeployed(t)
	r := rig.StartRedis(t)
	w := rig.StartWebhook(t, r.Address, "--path-secret-file="+file)
	return &abused{w, r, strings.TrimPrefix(w.URL, "https://"), "/mutate/" + secret}
}

// dial connects to the webhook over TLS.
func (a *abused) dial(ctx context.Context) (net.Conn, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second},
		Config: &tls.Config{InsecureSkipVerify: true}}
	return d.DialContext(ctx, "tcp", a.address)
}

// polite starts the polite client, which asks for admissions until the deadline of ctx.
// Like an API server, the client keeps one connection. It is a separate process: in the
// process of the misuse, it would wait for CPU. polite returns after the client's first
// answer. The returned function waits until the client ends, and returns the durations of
// its other admissions.
func (a *abused) polite(ctx context.Context, t *testing.T) func() []time.Duration {
	t.Helper()
	deadline, _ := ctx.Deadline()
	client := rig.NewProcess(os.Args[0])
	client.Cmd.Env = append(os.Environ(), politeURL+"="+a.URL+a.path+"?timeout=10s",
		politeUntil+"="+deadline.Format(time.RFC3339Nano))
	client.Cmd.Stdin = bytes.NewReader(rig.Review(t, rig.FreshID(), rig.MaxLength))
	client.Start(t)
	rig.Eventually(t, time.Minute, func() error {
		if !strings.Contains(client.Stdout.String(), "\n") {
			return errors.New("no admission was answered before the misuse: " + client.Log.String())
		}
		return nil
	})
	return func() (took []time.Duration) {
		client.WantExit(t, 0)
		for line := range strings.Lines(client.Stdout.String()) {
			var answer politeAnswer
			rig.Must(t, json.Unmarshal([]byte(line), &answer))
			if answer.Failure != "" {
				t.Errorf("an admission failed after %s: %s", answer.Took, answer.Failure)
			}
			took = append(took, answer.Took)
		}
		return took[1:]
	}
}

// misuse runs abuse repeatedly in many clients for a while, and checks the costs.
func (a *abused) misuse(t *testing.T, lasts time.Duration, many int, abuse func(ctx context.Context, i int)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), lasts)
	defer cancel()
	var wg sync.WaitGroup
	answers := a.polite(ctx, t)
	before := a.scheduled(t)
	a.overrun(ctx, &wg, many, abuse)
	wg.Wait()
	a.wantQuick(t, answers(), a.scheduled(t).since(before).stretch())
	a.wantBounded(t)
}

// overrun starts the misusing clients, about 500 a second: more TLS handshakes at once would
// delay every admission. The clients share two cores, so each pauses between two attempts.
func (a *abused) overrun(ctx context.Context, wg *sync.WaitGroup, many int, abuse func(ctx context.Context, i int)) {
	for i := range many {
		wg.Go(func() {
			_ = sleep(ctx, rand.N(time.Duration(many)*2*time.Millisecond))
			for ctx.Err() == nil {
				abuse(ctx, i)
				_ = sleep(ctx, 100*time.Millisecond)
			}
		})
	}
}

// scheduling is the time that the scheduler gave to the threads of a process.
type scheduling struct {
	ran, waited time.Duration // on a core, and waiting for one
}

// scheduled returns the scheduling of the webhook up to now.
func (a *abused) scheduled(t *testing.T) (s scheduling) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", a.Pid()))
	rig.Must(t, err)
	if len(threads) == 0 {
		t.Fatal("the kernel does not report how long threads wait for a core")
	}
	for _, file := range threads {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) { // the thread has ended
			continue
		}
		rig.Must(t, err)
		var ran, waited time.Duration
		_, err = fmt.Sscan(string(text), &ran, &waited)
		rig.Must(t, err)
		s.ran, s.waited = s.ran+ran, s.waited+waited
	}
	return s
}

// since returns the scheduling since an earlier one.
func (s scheduling) since(before scheduling) scheduling {
	return scheduling{s.ran - before.ran, s.waited - before.waited}
}

// stretch returns how much longer the process's work took than on idle cores.
func (s scheduling) stretch() float64 {
	return float64(s.ran+s.waited) / float64(max(s.ran, 1))
}

// wantQuick checks how long the polite client's admissions took.
func (a *abused) wantQuick(t *testing.T, took []time.Duration, stretch float64) {
	t.Helper()
	if len(took) == 0 {
		t.Fatal("no admission was answered")
	}
	slices.Sort(took)
	at := func(percent int) time.Duration {
		return took[min(len(took)*percent/100, len(took)-1)].Round(100 * time.Microsecond)
	}
	t.Logf("%d admissions beside it took %s in the median, %s at 99 %%, %s at worst; stretch %.1f",
		len(took), at(50), at(99), at(100), stretch)
	if most := time.Duration(float64(maxLatency) * max(1, stretch/usualStretch)); at(99) > most {
		t.Errorf("want at most %s at 99 %%", most.Round(time.Millisecond))
	}
}

// wantBounded checks the memory of the webhook and the length of its log.
func (a *abused) wantBounded(t *testing.T) {
	t.Helper()
	a.WantNotEnded(t)
	peak := a.Memory(t, "VmHWM") << 10
	t.Logf("at most %d MiB resident", peak>>20)
	if peak > maxMemory {
		t.Errorf("want at most %d MiB", maxMemory>>20)
	}
	lines := 0
	for line := range strings.Lines(a.Log.String()) {
		if !strings.Contains(line, `"msg":"admission"`) || strings.Contains(line, `"verdict":"bad request"`) {
			lines++
		}
	}
	if lines > maxLogLines {
		t.Errorf("the webhook has logged %d lines about misuse, want at most %d", lines, maxLogLines)
	}
}

// sleep waits for d, or until ctx is done.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
