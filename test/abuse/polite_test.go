package abuse

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
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

	// At most 1 % of the polite client's admissions may take longer than maxLatency. On
	// busy cores, the 99th percentile may be maxRatio times that of the requests to the
	// reference.
	maxLatency = time.Second
	maxRatio   = 10

	maxLogLines = 100 // log lines about misuse
)

// Environment variables of the processes that run this test binary in a role.
const (
	roleVariable      = "ABUSE_ROLE"
	urlVariable       = "ABUSE_URL"
	referenceVariable = "ABUSE_REFERENCE_URL"
	untilVariable     = "ABUSE_UNTIL"

	politeRole    = "polite"    // the polite client; it reads the review from stdin
	referenceRole = "reference" // a server that does nothing; it prints its URL
)

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(roleVariable) {
	case politeRole:
		err = bePolite()
	case referenceRole:
		err = beReference()
	default:
		rig.Main(m, "make test-abuse")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// startRole starts the test binary in a role, and waits for its first line.
func startRole(t *testing.T, role string, stdin io.Reader, env ...string) *rig.Process {
	t.Helper()
	p := rig.NewProcess(os.Args[0])
	p.Cmd.Env = append(append(os.Environ(), roleVariable+"="+role), env...)
	p.Cmd.Stdin = stdin
	p.Start(t)
	rig.Eventually(t, time.Minute, func() error {
		if !strings.Contains(p.Stdout.String(), "\n") {
			return fmt.Errorf("the %s has printed nothing yet: %s", role, p.Log.String())
		}
		return nil
	})
	return p
}

// beReference answers requests without reading them, until the process is killed.
func beReference() error {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(w, r.Body)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	if _, err := fmt.Println(server.URL); err != nil {
		return err
	}
	select {}
}

// politeAnswer is the JSON line that the polite client prints for each admission.
type politeAnswer struct {
	Took      time.Duration
	Failure   string
	Reference time.Duration // the duration of the same request to the reference
}

// bePolite sends the review to the webhook and to the reference, forty times a second.
func bePolite() error {
	deadline, err := time.Parse(time.RFC3339Nano, os.Getenv(untilVariable))
	if err != nil {
		return err
	}
	body, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	post := func(url string) (took time.Duration, err error) {
		start := time.Now()
		response, err := client.Post(url, "application/json", bytes.NewReader(body))
		if err != nil {
			return time.Since(start), err
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err == nil && response.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s %s", response.Status, text)
		}
		return time.Since(start), err
	}
	for out := json.NewEncoder(os.Stdout); time.Now().Before(deadline); <-time.After(25 * time.Millisecond) {
		var answer politeAnswer
		if answer.Took, err = post(os.Getenv(urlVariable)); err != nil {
			answer.Failure = err.Error()
		}
		if answer.Reference, err = post(os.Getenv(referenceVariable)); err != nil {
			return err
		}
		if err := out.Encode(answer); err != nil {
			return err
		}
	}
	return nil
}

// abused is a webhook under misuse.
type abused struct {
	*rig.Webhook
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
	w := rig.StartWebhook(t, rig.StartRedis(t).Address, "--path-secret-file="+file)
	return &abused{w, strings.TrimPrefix(w.URL, "https://"), "/mutate/" + secret}
}

// dial connects to the webhook over TLS.
func (a *abused) dial(ctx context.Context, protocols ...string) (net.Conn, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second},
		Config: &tls.Config{InsecureSkipVerify: true, NextProtos: protocols}}
	return d.DialContext(ctx, "tcp", a.address)
}

// polite starts the polite client, which asks for admissions until the deadline of ctx.
// Like an API server, the client keeps one connection. It is a process of its own: in the
// process of the misuse, it would wait for CPU. polite returns after the client's first
// answer. The returned function waits until the client ends, and returns its other
// answers.
func (a *abused) polite(ctx context.Context, t *testing.T) func() []politeAnswer {
	t.Helper()
	reference := startRole(t, referenceRole, nil)
	deadline, _ := ctx.Deadline()
	client := startRole(t, politeRole, bytes.NewReader(rig.Review(t, rig.FreshID(), rig.MaxLength)),
		urlVariable+"="+a.URL+a.path+"?timeout=10s",
		referenceVariable+"="+strings.TrimSpace(reference.Stdout.String()),
		untilVariable+"="+deadline.Format(time.RFC3339Nano))
	return func() (answers []politeAnswer) {
		client.WantExit(t, 0)
		for line := range strings.Lines(client.Stdout.String()) {
			var answer politeAnswer
			rig.Must(t, json.Unmarshal([]byte(line), &answer))
			if answer.Failure != "" {
				t.Errorf("an admission failed after %s: %s", answer.Took, answer.Failure)
			}
			answers = append(answers, answer)
		}
		return answers[1:]
	}
}

// misuse runs abuse repeatedly in many clients for a while, and checks the costs.
func (a *abused) misuse(t *testing.T, lasts time.Duration, many int, abuse func(ctx context.Context, i int)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), lasts)
	defer cancel()
	var wg sync.WaitGroup
	answers := a.polite(ctx, t)
	a.overrun(ctx, &wg, many, abuse)
	wg.Wait()
	a.wantQuick(t, answers())
	a.wantBounded(t)
}

// overrun starts the misusing clients. They share two cores, so each pauses between two
// attempts.
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

// wantQuick checks how long the polite client's admissions took.
func (a *abused) wantQuick(t *testing.T, answers []politeAnswer) {
	t.Helper()
	if len(answers) == 0 {
		t.Fatal("no admission was answered")
	}
	var took, reference []time.Duration
	for _, answer := range answers {
		took, reference = append(took, answer.Took), append(reference, answer.Reference)
	}
	slices.Sort(took)
	slices.Sort(reference)
	at := func(all []time.Duration, percent int) time.Duration {
		return all[min(len(all)*percent/100, len(all)-1)].Round(100 * time.Microsecond)
	}
	t.Logf("%d admissions beside it took %s in the median, %s at 99 %%, %s at worst; the reference %s, %s and %s",
		len(took), at(took, 50), at(took, 99), at(took, 100),
		at(reference, 50), at(reference, 99), at(reference, 100))
	if most := max(maxLatency, maxRatio*at(reference, 99)); at(took, 99) > most {
		t.Errorf("want at most %s at 99 %%", most)
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
