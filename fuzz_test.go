package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	kjson "sigs.k8s.io/json"
)

// "make test" runs the fuzz tests on the seeds here and in testdata, and "make fuzz" on
// more.

// reviews are reviews that a real API server has sent.
func reviews(f testing.TB) (all [][]byte) {
	f.Helper()
	files, err := filepath.Glob("test/testdata/admission-reviews/*.json")
	if err != nil || len(files) == 0 {
		f.Fatalf("testdata has the reviews %v, %v", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		all = append(all, text)
	}
	return all
}

// fuzzedWebhook is a webhook without Redis: it makes all decisions that need no token.
func fuzzedWebhook(f *testing.F) *webhook {
	f.Helper()
	c := testConfig("127.0.0.1:1")
	c.whenFull = whenFullWait
	log := slog.New(slog.DiscardHandler)
	who, err := newCallers(c, log)
	if err != nil {
		f.Fatal(err)
	}
	s := newSemaphores(c.settings, nil, 1, log)
	// after a long outage, the webhook does not wait for Redis
	s.outages.parts[0] = outage{began: time.Now().Add(-time.Hour), last: time.Now()}
	return &webhook{admitter: newAdmitter(c, s), callers: who, bounds: newBounds(), log: log}
}

// For any body, the reply is an AdmissionReview of the same UID, or names the problem of
// the request.
func FuzzReview(f *testing.F) {
	for _, text := range reviews(f) {
		f.Add(text)
		f.Add(bytes.Replace(text, []byte(`"dryRun":false`), []byte(`"dryRun":true`), 1))
	}
	f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"a",` +
		`"operation":"CREATE","kind":{"group":"batch","kind":"Job"},"object":null}}`))
	w := fuzzedWebhook(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		request := httptest.NewRequest(http.MethodPost, "/mutate", bytes.NewReader(body))
		request.Header.Set("Content-Type", "application/json")
		rec := httptest.NewRecorder()
		w.routes().ServeHTTP(rec, request)
		text := rec.Body.String()
		switch {
		case rec.Code >= 400 && rec.Code < 500:
			return
		case rec.Code == http.StatusInternalServerError && strings.Contains(text, "queue Redis"):
			// a pod that needs a token now
			return
		case rec.Code != http.StatusOK:
			t.Fatalf("got %d %s", rec.Code, text)
		}
		d := json.NewDecoder(rec.Body)
		d.DisallowUnknownFields()
		var answer admissionv1.AdmissionReview
		rig.Must(t, d.Decode(&answer))
		asked, err := decodeReview(body)
		rig.Must(t, err)
		if r := answer.Response; r == nil || answer.APIVersion != "admission.k8s.io/v1" ||
			answer.Kind != "AdmissionReview" || string(r.UID) != strings.ToValidUTF8(string(asked.UID), "\ufffd") {
			t.Fatalf("got %s", text)
		} else if r.Patch != nil {
			wantApplies(t, asked.Object, r.Patch)
		}
	})
}

// For any pod that Kubernetes could send, the patch applies, and the result is a pod.
func FuzzPod(f *testing.F) {
	for _, text := range reviews(f) {
		r, err := decodeReview(text)
		if err != nil {
			f.Fatal(err)
		}
		f.Add([]byte(r.Object), true)
	}
	f.Add([]byte(`{"metadata":{"annotations":{}},"spec":{"containers":[]}}`), false)
	f.Fuzz(func(t *testing.T, object []byte, native bool) {
		p, err := decodePod(&admissionRequest{Namespace: "shop", Object: object})
		var wrong *badRequest
		if err != nil && !errors.As(err, &wrong) {
			t.Fatal(err)
		}
		if err != nil {
			return
		}
		c := testConfig("redis:6379")
		c.enableSidecarContainers = native
		c.sidecarImagePullSecret, c.sidecarRedisCA = "pull", objectReference{"secret", "ca"}
		wantApplies(t, object, sidecarPatch(c, p, testID, testSpec, testToken))
	})
}

// wantApplies applies a patch if the object is a pod as Kubernetes sends it: with exact
// field names, and, if annotated, with annotations and containers.
func wantApplies(t *testing.T, object, patch []byte) {
	t.Helper()
	var before corev1.Pod
	problems, err := kjson.UnmarshalStrict(object, &before)
	if err != nil || len(problems) > 0 || before.Annotations == nil || before.Spec.Containers == nil ||
		!utf8.Valid(object) {
		return
	}
	steps, err := jsonpatch.DecodePatch(patch)
	rig.Must(t, err)
	result, err := steps.Apply(object)
	if err != nil {
		t.Fatalf("%v: %s does not apply to %s", err, patch, object)
	}
	var after corev1.Pod
	if problems, err := kjson.UnmarshalStrict(result, &after); err != nil || len(problems) > 0 {
		t.Fatalf("%v, %v: %s", err, problems, result)
	}
	for _, c := range append(after.Spec.InitContainers, after.Spec.Containers...) {
		if c.Name == sidecarName {
			return
		}
	}
	t.Fatalf("no sidecar in %s", result)
}

// Parsed annotations are within bounds; any problem names its annotation.
func FuzzAnnotations(f *testing.F) {
	f.Add("web", "3", "10", "wait")
	f.Add("a/b", "10000", "3600", "deny")
	f.Add("/", "-1", "0x10", "")
	f.Fuzz(func(t *testing.T, key, length, expiration, whenFull string) {
		spec, problems := parseAnnotations(map[string]string{annotationKey: key, annotationLength: length,
			annotationExpiration: expiration, annotationWhenFull: whenFull}, whenFullDeny)
		for _, p := range problems {
			if !strings.Contains(p, annotationPrefix) || strings.Contains(p, "\n") || len(p) > 400 {
				t.Errorf("the problem %q is long, has a newline, or names no annotation", p)
			}
		}
		if len(problems) > 0 {
			return
		}
		if spec.length < 1 || spec.length > maxLength || spec.expiration < time.Second ||
			spec.expiration > maxExpiration*time.Second || checkKey(spec.key) != "" {
			t.Errorf("out of bounds: %+v", spec)
		}
		id := semaphoreID{"shop", spec.key}
		if read, ok := idOfStateKey(id.stateKey()); !ok || read != id {
			t.Errorf("%s is parsed as %s", id, read)
		}
	})
}

// Any command line is parsed, or the error names its problems.
func FuzzFlags(f *testing.F) {
	f.Add("webhook", "--queue-redis-address=redis+sentinel://a:1,b:2/c\n--sidecar-resources=cpu=1,memory=1Gi")
	f.Add("sidecar", "--length=3\nshop/web\n0a7b9d10-0000-4000-8000-000000000000")
	f.Add("status", "release\nshop/web\nweb-1\n--yes\n-o\njson")
	f.Fuzz(func(t *testing.T, mode, line string) {
		args := strings.Split(line, "\n")
		none := func(string) string { return "" }
		var err error
		switch mode {
		case "webhook":
			_, err = parseWebhookConfig(args, none)
		case "sidecar":
			_, err = parseSidecarConfig(args, none)
		default:
			_, err = parseStatusConfig(args, none)
		}
		var usage *usageError
		var help *helpRequest
		if err != nil && !errors.As(err, &usage) && !errors.As(err, &help) {
			t.Errorf("%q: %v", args, err)
		}
	})
}

// answering is a connection to a server with fixed replies.
type answering struct {
	net.Conn
	io.Reader
}

func (a answering) Read(b []byte) (int, error)         { return a.Reader.Read(b) }
func (answering) Write(b []byte) (int, error)          { return len(b), nil }
func (answering) Close() error                         { return nil }
func (answering) SetDeadline(time.Time) error          { return nil }
func (a answering) SetReadDeadline(t time.Time) error  { return nil }
func (a answering) SetWriteDeadline(t time.Time) error { return nil }

// Any reply of Redis, to scripts and to a survey, is parsed or gives an error.
func FuzzAnswers(f *testing.F) {
	for _, text := range []string{
		"*3\r\n:1\r\n:1700000000000000\r\n:3\r\n",
		"*3\r\n:2\r\n:1700000000000000\r\n:1\r\n",
		"*6\r\n:0\r\n:1700000000000000\r\n:3\r\n:0\r\n:0\r\n*2\r\n:5\r\n$5\r\nweb-1\r\n",
		"*11\r\n:0\r\n:1700000000000000\r\n:3\r\n:2\r\n:9\r\n*0\r\n:2\r\n" +
			"$16\r\n1700000000000000\r\n:41\r\n:7\r\n:1\r\n",
		"*2\r\n$10\r\n1700000000\r\n$6\r\n123456\r\n" +
			"*8\r\n:1\r\n:2\r\n:0\r\n:0\r\n*2\r\n$1\r\na\r\n$10\r\n1700000000\r\n:0\r\n*0\r\n*3\r\n$1\r\n3\r\n$-1\r\n$-1\r\n",
		"-MOVED 1 127.0.0.1:7000\r\n", "$-1\r\n", "*-1\r\n", "+OK\r\n",
	} {
		f.Add([]byte(text))
	}
	ctx := context.Background()
	// redigo allocates as much as Redis announces.
	huge := regexp.MustCompile(`[*$]\d{7}`)
	f.Fuzz(func(t *testing.T, data []byte) {
		if huge.Match(data) {
			t.Skip()
		}
		dial := func() redis.Conn {
			return redis.NewConn(answering{Reader: bytes.NewReader(data)}, time.Second, time.Second)
		}
		if values, err := redis.Values(dial().Do("EVALSHA")); err == nil {
			var status int
			var micros int64
			if rest, err := redis.Scan(values, &status, &micros); err == nil {
				if a, err := parseReply(status, rest); err == nil {
					_ = waitingText(testID, 3, a)
					_ = refusal(&fullError{testID, a.inUse, 3, a.waiters, a.holders, a.doubt})
				}
			}
		}
		s := newSemaphores(testConfig("127.0.0.1:1").settings, nil, 1, slog.New(slog.DiscardHandler))
		states, _ := s.readStates(ctx, dial(), []semaphoreID{testID})
		var d semaphoreDetail
		d.id = testID
		_ = s.readTokens(ctx, dial(), &d)
		var page strings.Builder
		printTable(&page, states, "")
		printDetail(&page, d)
		rig.Must(t, printJSON(&page, d.report()))
		if strings.Contains(page.String(), "\x1b") {
			t.Errorf("status prints unprintable text: %q", page.String())
		}
		_, _ = readSlots("127.0.0.1:1", first(dial().Do("CLUSTER", "SLOTS")))
	})
}

func first(reply any, _ error) any { return reply }
