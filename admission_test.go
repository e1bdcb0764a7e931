package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

func TestDryRunTakesNothing(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	id := freshID()
	a := w.admit(t, rig.Review(t, id, 1, func(request map[string]any) { request["dryRun"] = true }))
	if !a.Allowed || a.Token != "00000000-0000-0000-0000-000000000000" {
		t.Fatalf("got %+v", a)
	}
	lines := w.log.WantLines(t, "admission", 1)
	if lines[0]["verdict"] != verdictDryRun || lines[0]["token"] != "" {
		t.Errorf("logged %v", lines)
	}
}

// Each line of the owners' settings is read, or named with what is wrong. The most exact
// line counts.
func TestOwnerSettings(t *testing.T) {
	t.Parallel()
	s, err := parseOwnerSettings([][]byte{[]byte("# a comment\n\nshop/web length=3\r\nshop/* length=10 # more\n" +
		"*/web length=7\nshop/held length=0\n@matlab length=5 namespaces=shop,ci-*\n")})
	rig.Must(t, err)
	for id, want := range map[string]int{"shop/web": 3, "shop/cart": 10, "lab/web": 7, "lab/cart": -1, "shop/held": 0,
		"@matlab": 5, "@other": -1} {
		semaphore, _ := parseSemaphoreID(id)
		if got := limitOf(s, semaphore); got.length != want || got.isSet() != (want >= 0) {
			t.Errorf("%s: got %v, want %d", id, got, want)
		}
	}
	for namespace, want := range map[string]string{"shop": "[matlab]", "ci-7": "[matlab]", "ci": "[]", "shop-2": "[]"} {
		if got := fmt.Sprint(s.sharedBy(namespace)); got != want {
			t.Errorf("%s shares %s, want %s", namespace, got, want)
		}
	}
	for line, want := range map[string]string{
		"shop/web":                          "length=N is missing",
		"shop/web length=":                  "length is \"\": it must be a whole number from 0 to 10000",
		"shop/web length=10001":             "length is \"10001\"",
		"shop/web length=-1":                "length is \"-1\"",
		"shop/web length=3 length=4":        "\"length=4\" is unknown, or there twice",
		"shop/web length=3 colour=red":      "\"colour=red\" is unknown",
		"shop/web length=3 head-start=-1":   "head-start is \"-1\": it must be a whole number from 0 to 604800",
		"shop/web length=3 head-start=9e9":  "head-start is \"9e9\"",
		"shop/web head-start=1 head-start=": "\"head-start=\" is unknown, or there twice",
		"shop/web length=3 overtake=0":      "overtake is \"0\": it must be a whole number from 1 to 604800",
		"shop/web length=3 overtake=":       "overtake is \"\"",
		"shop/web when-waited=fail":         "\"when-waited=fail\" is unknown",
		"shop length=3":                     "\"shop\" is no semaphore",
		"*/* length=3":                      "\"*/*\" is no semaphore",
		"sh*p/web length=3":                 "is no semaphore",
		"Shop/web length=3":                 "is no semaphore",
		"shop/-web length=3":                "is no semaphore",
		"@ length=3 namespaces=shop":        "is no semaphore",
		"@matlab length=3":                  "namespaces=NAME,... is missing",
		"@matlab length=3 namespaces=":      "namespaces has \"\"",
		"@matlab length=3 namespaces=a,[b]": "namespaces has \"[b]\"",
		"shop/web length=3 namespaces=lab":  "only a semaphore that begins with @ has namespaces",
		"a/b length=1\na/b length=2":        "line 2: \"a/b\" has line 1 already",
		"@m length=1 namespaces=a\n@m x=1":  "line 2: \"x=1\" is unknown",
		"a/b length=1\n\n\n\x00/c length=2": "line 4: \"\\x00/c\" is no semaphore",
	} {
		_, err := parseOwnerSettings([][]byte{[]byte(line)})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "line ") {
			t.Errorf("%q: got %v, want %s", line, err, want)
		}
	}
}

// ownersWebhook starts a webhook with the settings of owners, and returns their file.
func ownersWebhook(t *testing.T, address, text string) (w *testWebhook, file string) {
	t.Helper()
	c := testConfig(address)
	c.semaphoresFile = filepath.Join(t.TempDir(), "semaphores")
	rig.Must(t, os.WriteFile(c.semaphoresFile, []byte(text), 0o600))
	return startWebhook(t, c), c.semaphoresFile
}

// A length that the owner has set replaces that of the annotation, which may be missing.
func TestOwnersLength(t *testing.T) {
	t.Parallel()
	r, id, shares := rig.StartRedis(t), freshID(), freshID().key
	w, _ := ownersWebhook(t, r.Address, id.String()+" length=1\n"+id.namespace+"/held length=0\n"+
		"@"+shares+" length=1 namespaces="+id.namespace)
	asks := func(key, length string) func(map[string]any) {
		return func(request map[string]any) {
			a := rig.AnnotationsOf(request)
			a[annotationKey], a[annotationLength] = key, length
			if length == "" {
				delete(a, annotationLength)
			}
		}
	}
	elsewhere := func(request map[string]any) { request["namespace"] = "elsewhere" }
	first := w.admit(t, rig.Review(t, id, 1, asks(id.key, "5")))
	if want := fmt.Sprintf(warningSet, 5, 1, id); !first.Allowed || len(first.Warnings) != 1 || first.Warnings[0] != want {
		t.Errorf("got %+v, want the warning %s", first, want)
	}
	if patch := string(first.Patch); !strings.Contains(patch, "--length=1\"") {
		t.Errorf("the sidecar gets another length: %s", patch)
	}
	for name, c := range map[string]struct {
		code    int32
		want    string
		changes []func(map[string]any)
	}{
		"greater": {http.StatusTooManyRequests, "1 of 1 tokens in use", []func(map[string]any){asks(id.key, "5")}},
		"none":    {http.StatusTooManyRequests, "1 of 1 tokens in use", []func(map[string]any){asks(id.key, "")}},
		"wrong": {http.StatusUnprocessableEntity, "length is \"x\": it must be a whole number",
			[]func(map[string]any){asks(id.key, "x")}},
		"paused": {http.StatusTooManyRequests, id.namespace + "/held is paused by the ConfigMap semaphores; 0 in use",
			[]func(map[string]any){asks("held", "2")}},
		"nowhere": {http.StatusUnprocessableEntity,
			"length is missing: it must be a whole number from 1 to 10000, unless the ConfigMap semaphores sets a length",
			[]func(map[string]any){asks("other", "")}},
		"not shared": {http.StatusUnprocessableEntity, "@other is not in the ConfigMap semaphores",
			[]func(map[string]any){asks("@other", "2")}},
		"not listed": {http.StatusUnprocessableEntity, "is not for the namespace elsewhere: by the ConfigMap semaphores, it is for " + id.namespace,
			[]func(map[string]any){asks("@"+shares, ""), elsewhere}},
	} {
		if a := w.admit(t, rig.Review(t, id, 1, c.changes...)); a.Allowed || a.Code != c.code || !strings.Contains(a.Message, c.want) {
			t.Errorf("%s: got %+v, want %d %s", name, a, c.code, c.want)
		}
	}
	a := w.admit(t, rig.Review(t, id, 1, asks("@"+shares, "")))
	if !a.Allowed || !strings.Contains(string(a.Patch), "POD_NAMESPACE") || !strings.Contains(string(a.Patch), "\"@"+shares+"\"") {
		t.Errorf("got %+v", a)
	}
	d, err := w.semaphores.inspect(t.Context(), semaphoreID{shared, shares}, detailMost)
	if err != nil || len(d.holders) != 1 || !strings.HasPrefix(d.holders[0].pod, id.namespace+"/web-") {
		t.Errorf("the shared semaphore has the holders %+v, %v", d.holders, err)
	}
}

// Redis learns of a pause before the sidecar of the first pod asks, whatever length it
// says.
func TestOwnersPauseHoldsBackWaitingPods(t *testing.T) {
	t.Parallel()
	r, id := rig.StartRedis(t), freshID()
	w, _ := ownersWebhook(t, r.Address, id.namespace+"/* length=0")
	if a := w.admit(t, rig.Review(t, id, 3, whenFull(whenFullWait))); !a.Allowed {
		t.Fatalf("got %+v", a)
	}
	r.Shift(t, id, -time.Hour) // it pulls its image
	a, err := w.semaphores.runAcquire(t.Context(), id, acquireRequest{token: uuid.NewString(), length: 3, arrival: joinLine})
	if text := waitingText(id, 3, 1, waitEnd{}, a); err != nil || a.status != acquireFull || !strings.Contains(text, "paused by the ConfigMap semaphores; 0 in use, 1st in line") {
		t.Errorf("got %s, %v", text, err)
	}
}

// A webhook keeps the limits in Redis: those that Redis has lost, and those that change
// in its file. A bad file changes nothing, and is logged with the line.
func TestWebhookKeepsLimits(t *testing.T) {
	t.Parallel()
	r, id := rig.StartRedis(t), freshID()
	w, file := ownersWebhook(t, r.Address, "nonsense")
	status, text, err := w.post(t.Context(), rig.Review(t, id, 1, func(request map[string]any) {
		delete(rig.AnnotationsOf(request), annotationLength)
	}), "5s")
	if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, "line 1: \"nonsense\" is no semaphore") {
		t.Errorf("got %d %s, %v", status, text, err)
	}
	w.wantAdmitted(t, id, 5)
	go w.keepLimits(t.Context())
	want := func(length int, known bool) {
		t.Helper()
		rig.Eventually(t, 20*time.Second, func() error {
			d, err := w.semaphores.inspect(t.Context(), id, detailMost)
			if got := d.setting.limit; err != nil || got.isSet() != known || known && got.length != length {
				return fmt.Errorf("the limit is %+v, %v; want %d, %t", got, err, length, known)
			}
			return nil
		})
	}
	write := func(text string) {
		t.Helper()
		rig.Must(t, os.WriteFile(file+".new", []byte(text), 0o600))
		rig.Must(t, os.Rename(file+".new", file))
	}
	write(id.namespace + "/* length=1")
	want(1, true)
	w.wantFull(t, id, 1, 1)
	write(id.String() + " length=2\n" + id.String() + "/ length=2")
	rig.Eventually(t, 10*time.Second, func() error {
		lines := w.log.Lines(t, "changed files not taken, what they held before stays in use")
		if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]["error"]), "line 2: ") {
			return fmt.Errorf("logged %v", lines)
		}
		return nil
	})
	write(id.String() + " length=2")
	want(2, true)
	r.Do(t, "DEL", id.keys()...)
	want(2, true)
	rig.Must(t, os.Remove(file))
	want(0, false)
}

// The audit log of the API server gets the verdict, the semaphore, the pod's name or the
// beginning of it, and a token that the webhook took. The token of a pod that waits is its
// UID, which it has not got yet. Pods without our annotation get no entry.
func TestAuditAnnotations(t *testing.T) {
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	id := freshID()
	admitted := w.admit(t, rig.Review(t, id, 1))
	audit := func(verdict, pod, token string) string {
		annotations := map[string]string{"semaphore": id.String(), "verdict": verdict, "pod": pod}
		if token != "" {
			annotations["token"] = token
		}
		return fmt.Sprint(annotations)
	}
	const generated = "web-67d4947b99-"
	named := func(request map[string]any) {
		request["object"].(map[string]any)["metadata"].(map[string]any)["name"] = "web-1"
	}
	for want, a := range map[string]rig.Admission{
		audit("admitted", generated, admitted.Token): admitted,
		audit("full", generated, ""):                 w.admit(t, rig.Review(t, id, 1)),
		audit("invalid", generated, ""):              w.admit(t, rig.Review(t, id, 0)),
		audit("wait", generated, ""):                 w.admit(t, rig.Review(t, id, 1, whenFull(whenFullWait))),
		audit("gate", "web-1", ""):                   w.admit(t, rig.Review(t, id, 1, whenFull(whenFullGate), named)),
		"map[]": w.admit(t, rig.Review(t, id, 1, func(request map[string]any) {
			rig.AnnotationsOf(request)[annotationEnabled] = "false"
		})),
	} {
		if got := fmt.Sprint(a.Audit); got != want || admitted.Token == "" {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// A pod whose grace period is too short for its sidecar is admitted with a warning.
func TestWarningOfAShortGracePeriod(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	w := startWebhook(t, testConfig(r.Address))
	for grace, want := range map[int]int{0: 1, 9: 1, 10: 0, 30: 0} {
		a := w.admit(t, rig.Review(t, freshID(), 1, func(request map[string]any) {
			request["object"].(map[string]any)["spec"].(map[string]any)["terminationGracePeriodSeconds"] = grace
		}))
		if !a.Allowed || len(a.Warnings) != want || want == 1 && a.Warnings[0] != fmt.Sprintf(warningGrace, grace, 10) {
			t.Errorf("grace period %d s: got %+v", grace, a)
		}
	}
}

func TestInvalidAnnotations(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	number := func(name string, most int) map[string]string {
		must := fmt.Sprintf(": it must be a whole number from 1 to %d", most)
		cases := map[string]string{}
		for _, v := range []string{"0", "-1", "abc", "3.5", "99999999", "", " 3", "+3", "3\n", "0x3"} {
			cases[v] = fmt.Sprintf("%s%s is %q%s", annotationPrefix, name, v, must)
		}
		long := "1" + strings.Repeat("0", 30)
		cases[long] = fmt.Sprintf("%s%s is %q%s", annotationPrefix, name, long, must)
		return cases
	}
	const keyRule = ": it must be letters, digits and . _ / -, and begin and end with a letter or digit"
	keys := map[string]string{strings.Repeat("k", 300): ": it has 300 characters: at most 253 are allowed"}
	for _, k := range []string{"", "{}", "a{b}", "a\nb", "a\n", "-a", "a/", "ä", "a b"} {
		keys[k] = fmt.Sprintf("%skey is %q%s", annotationPrefix, k, keyRule)
	}
	for name, cases := range map[string]map[string]string{
		"length": number("length", 10000), "expiration": number("expiration", 3600), "key": keys,
		"wait-seconds": number("wait-seconds", 604800),
	} {
		for value, want := range cases {
			a := w.admit(t, rig.Review(t, freshID(), 1, func(request map[string]any) {
				rig.AnnotationsOf(request)[annotationPrefix+name] = value
			}))
			if a.Allowed || a.Code != http.StatusUnprocessableEntity || a.Patch != nil {
				t.Errorf("%s %q: got %+v", name, value, a)
			}
			if !strings.HasPrefix(a.Message, "invalid annotations: ") || !strings.Contains(a.Message, want) ||
				strings.Contains(a.Message, "\n") {
				t.Errorf("%s %q: message %q, want %q in it", name, value, a.Message, want)
			}
		}
	}
}

// One message names all problems.
func TestAllProblemsAtOnce(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	a := w.admit(t, rig.Review(t, freshID(), 1, func(request map[string]any) {
		annotations := rig.AnnotationsOf(request)
		annotations[annotationKey] = "a b"
		annotations[annotationLength] = "many"
		delete(annotations, annotationExpiration)
	}))
	want := "invalid annotations: " +
		`at-least-semaphore-pod-hook.kaidotio.github.io/key is "a b": it must be letters, digits and . _ / -, ` +
		`and begin and end with a letter or digit; ` +
		`at-least-semaphore-pod-hook.kaidotio.github.io/length is "many": it must be a whole number from 1 to 10000; ` +
		`at-least-semaphore-pod-hook.kaidotio.github.io/expiration is missing: it must be a whole number from 1 to 3600`
	if a.Message != want {
		t.Errorf("message is\n%s\nwant\n%s", a.Message, want)
	}
}

// The decision on invalid annotations takes less than a millisecond. The fastest of many
// runs counts, as the machine may be busy.
func TestInvalidAnnotationsAreCheap(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	body := rig.Review(t, freshID(), 1, func(request map[string]any) {
		rig.AnnotationsOf(request)[annotationLength] = "1e30"
	})
	least := time.Hour
	// a busy machine needs more tries
	for end := time.Now().Add(5 * time.Second); least > time.Millisecond && time.Now().Before(end); {
		start := time.Now()
		r, err := decodeReview(body)
		rig.Must(t, err)
		d, err := w.decide(context.Background(), r)
		rig.Must(t, err)
		if d.response.Allowed {
			t.Fatal("invalid annotations were allowed")
		}
		least = min(least, time.Since(start))
	}
	if least > time.Millisecond {
		t.Errorf("the fastest decision took %s", least)
	}
}

// Requests that are not for us are allowed without a patch, and without Redis.
func TestAllowedUntouched(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	for name, change := range map[string]func(map[string]any){
		"not annotated":   func(r map[string]any) { delete(rig.AnnotationsOf(r), annotationEnabled) },
		"annotated false": func(r map[string]any) { rig.AnnotationsOf(r)[annotationEnabled] = "false" },
		"no annotations": func(r map[string]any) {
			delete(r["object"].(map[string]any)["metadata"].(map[string]any), "annotations")
		},
		"null annotations": func(r map[string]any) {
			r["object"].(map[string]any)["metadata"].(map[string]any)["annotations"] = nil
		},
		"update":        func(r map[string]any) { r["operation"] = "UPDATE" },
		"delete":        func(r map[string]any) { r["operation"], r["object"] = "DELETE", nil },
		"another kind":  func(r map[string]any) { r["kind"].(map[string]any)["kind"] = "Service" },
		"another group": func(r map[string]any) { r["kind"].(map[string]any)["group"] = "example.org" },
		"a subresource": func(r map[string]any) { r["subResource"] = "eviction" },
	} {
		a := w.admit(t, rig.Review(t, freshID(), 1, change))
		if !a.Allowed || a.Patch != nil || a.Message != "" {
			t.Errorf("%s: got %+v", name, a)
		}
	}
	if log := w.log.String(); log != "" {
		t.Errorf("logged %s", log)
	}
}

func TestUnanswerableRequests(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	good := string(rig.Review(t, freshID(), 1))
	with := func(change func(map[string]any)) string {
		var r map[string]any
		rig.Must(t, json.Unmarshal([]byte(good), &r))
		change(r)
		body, err := json.Marshal(r)
		rig.Must(t, err)
		return string(body)
	}
	for _, c := range []struct {
		name, method, path, contentType, body string
		status                                int
		text                                  string
	}{
		{"method", "GET", "/mutate", "application/json", "", 405, "method GET is not allowed: POST an AdmissionReview"},
		{"path", "POST", "/", "application/json", good, 404, "not found: admission reviews are served at /mutate"},
		{"content type", "POST", "/mutate", "text/plain", good, 415,
			`Content-Type is "text/plain": it must be application/json`},
		{"no content type", "POST", "/mutate", "", good, 415, `Content-Type is "": it must be application/json`},
		{"empty", "POST", "/mutate", "application/json", "", 400, "empty body"},
		{"truncated", "POST", "/mutate", "application/json", good[:len(good)/2], 400,
			"decode AdmissionReview: unexpected end of JSON input"},
		{"not JSON", "POST", "/mutate", "application/json", "hello", 400,
			"decode AdmissionReview: invalid character 'h'"},
		{"more behind", "POST", "/mutate", "application/json", good + "{}", 400, "after top-level value"},
		{"oversized", "POST", "/mutate", "application/json", strings.Repeat(" ", maxBody+1), 413,
			"the body is larger than 10485760 bytes"},
		{"nested", "POST", "/mutate", "application/json", strings.Repeat("[", 2*smallBody), 400, "exceeded max depth"},
		{"many objects", "POST", "/mutate", "application/json",
			`{"request":` + strings.Repeat(`{"a":`, maxObjects), 413,
			"the body has 50001 objects: at most 50000 are decoded"},
		{"nested inside", "POST", "/mutate", "application/json", `{"request":` + strings.Repeat(`{"a":`, 20000), 400,
			"exceeded max depth"},
		{"an array", "POST", "/mutate", "application/json", "[]", 400, "decode AdmissionReview"},
		{"null", "POST", "/mutate", "application/json", "null", 400,
			"only AdmissionReview of admission.k8s.io/v1 is served"},
		{"version", "POST", "/mutate", "application/json",
			with(func(r map[string]any) { r["apiVersion"] = "admission.k8s.io/v1beta1" }), 400,
			`got "AdmissionReview" of "admission.k8s.io/v1beta1": ` +
				`only AdmissionReview of admission.k8s.io/v1 is served`},
		{"kind", "POST", "/mutate", "application/json", with(func(r map[string]any) { r["kind"] = "Pod" }), 400,
			`got "Pod" of`},
		{"no request", "POST", "/mutate", "application/json",
			with(func(r map[string]any) { delete(r, "request") }), 400,
			"without a request"},
		{"no uid", "POST", "/mutate", "application/json",
			with(func(r map[string]any) { delete(r["request"].(map[string]any), "uid") }), 400,
			"without request.uid"},
		{"no namespace", "POST", "/mutate", "application/json",
			with(func(r map[string]any) { delete(r["request"].(map[string]any), "namespace") }), 400,
			"without request.namespace"},
		{"no object", "POST", "/mutate", "application/json",
			with(func(r map[string]any) { r["request"].(map[string]any)["object"] = nil }), 400,
			"without request.object"},
		{"wrong object", "POST", "/mutate", "application/json",
			with(func(r map[string]any) { r["request"].(map[string]any)["object"] = "pod" }), 400,
			"decode request.object"},
		{"wrong annotations", "POST", "/mutate", "application/json", with(func(r map[string]any) {
			rig.AnnotationsOf(r["request"].(map[string]any))[annotationEnabled] = true
		}), 400, "decode request.object"},
	} {
		t.Run(c.name, func(t *testing.T) {
			request, err := http.NewRequest(c.method, w.server.URL+c.path, strings.NewReader(c.body))
			rig.Must(t, err)
			if c.contentType != "" {
				request.Header.Set("Content-Type", c.contentType)
			}
			response, err := w.server.Client().Do(request)
			rig.Must(t, err)
			defer response.Body.Close()
			b := make([]byte, 1000)
			n, _ := response.Body.Read(b)
			if text := string(b[:n]); response.StatusCode != c.status || !strings.Contains(text, c.text) {
				t.Errorf("got %d %q, want %d %q", response.StatusCode, text, c.status, c.text)
			}
			if c.status == 405 && response.Header.Get("Allow") != "POST" {
				t.Errorf("Allow is %q", response.Header.Get("Allow"))
			}
		})
	}
}

// Only a pod that should complete, and has a classic sidecar, gets a warning.
func TestWarningNotCompleting(t *testing.T) {
	for _, native := range []bool{true, false} {
		c := testConfig(rig.FreeAddress(t))
		c.enableSidecarContainers = native
		w := startWebhook(t, c)
		for _, policy := range []string{"Always", "OnFailure", "Never"} {
			a := w.admit(t, rig.Review(t, freshID(), 1, func(request map[string]any) {
				request["dryRun"] = true
				request["object"].(map[string]any)["spec"].(map[string]any)["restartPolicy"] = policy
			}))
			if want := !native && policy != "Always"; !a.Allowed || (len(a.Warnings) > 0) != want {
				t.Errorf("native %t, restartPolicy %s: warnings %q", native, policy, a.Warnings)
			}
		}
	}
}

// The same for a Job, which the webhook never patches.
func TestWarningForJob(t *testing.T) {
	t.Parallel()
	for _, native := range []bool{true, false} {
		c := testConfig(rig.FreeAddress(t))
		c.enableSidecarContainers = native
		w := startWebhook(t, c)
		for _, kind := range []string{"Job", "CronJob"} {
			for enabled, want := range map[string][]string{"true": {fmt.Sprintf(warningJob, kind)}, "false": nil} {
				if native {
					want = nil
				}
				wantWarned(t, w, fmt.Sprintf("%s, native %t, enabled %s", kind, native, enabled), rig.Review(t, freshID(), 1,
					setAnnotations(map[string]string{"at-least-semaphore-pod": enabled}), asWorkload("CREATE", "batch", kind, nil)),
					want...)
			}
		}
	}
}

// The mirror pod of a static pod is allowed unpatched, as it cannot get a sidecar. It
// takes no token and gets a warning.
func TestStaticPodIsLeftAlone(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t))) // no Redis
	a := w.admit(t, rig.Review(t, freshID(), 1, func(r map[string]any) {
		rig.AnnotationsOf(r)["kubernetes.io/config.mirror"] = "0123"
	}))
	if !a.Allowed || a.Patch != nil || !slices.Equal(a.Warnings, []string{warningStatic}) {
		t.Errorf("got %+v", a)
	}
	if lines := w.log.WantLines(t, "admission", 1); lines[0]["verdict"] != verdictStatic || lines[0]["token"] != "" {
		t.Errorf("logged %v", lines)
	}
}

// A Windows pod cannot run the sidecar: it is refused with the reason.
func TestWindowsPodIsDenied(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t))) // no Redis
	for name, more := range map[string]map[string]any{
		"os":           {"os": map[string]any{"name": "windows"}},
		"nodeSelector": {"nodeSelector": map[string]any{"kubernetes.io/os": "windows"}},
	} {
		a := w.admit(t, rig.Review(t, freshID(), 1, func(r map[string]any) {
			maps.Copy(r["object"].(map[string]any)["spec"].(map[string]any), more)
		}))
		want := "this is a Windows pod (by spec.os.name, or its nodeSelector kubernetes.io/os): " +
			"the sidecar of a semaphore runs on Linux only"
		if a.Allowed || a.Code != http.StatusUnprocessableEntity || a.Message != want {
			t.Errorf("%s: got %+v", name, a)
		}
	}
}

// whenFull sets the when-full annotation of the pod in a review.
func whenFull(value string) func(map[string]any) {
	return func(request map[string]any) { rig.AnnotationsOf(request)[annotationWhenFull] = value }
}

// A pod's head start goes to its sidecar, as far as the webhook and the owner allow it.
func TestHeadStart(t *testing.T) {
	t.Parallel()
	c := testConfig(rig.FreeAddress(t))
	c.maxHeadStart, c.semaphoresFile = 900*time.Second, filepath.Join(t.TempDir(), "semaphores")
	rig.Must(t, os.WriteFile(c.semaphoresFile, []byte("shop/none length=3 head-start=0\nshop/some length=3 head-start=60\n"), 0o600))
	w := startWebhook(t, c)
	admit := func(key, headStart, whenFull string) rig.Admission {
		return w.admit(t, rig.Review(t, semaphoreID{"shop", key}, 3, func(request map[string]any) {
			a := rig.AnnotationsOf(request)
			a[annotationHeadStart], a[annotationWhenFull] = headStart, whenFull
		}))
	}
	for key, c := range map[string]struct{ asks, args, warning string }{
		"web":  {"600", "--head-start-seconds=600", ""},
		"most": {"900", "--head-start-seconds=900", ""},
		"zero": {"0", "", ""},
		"less": {"0", "", ""},
		"none": {"600", "", fmt.Sprintf(warningHeadStart, 600, 0, "shop/none")},
		"some": {"600", "--head-start-seconds=60", fmt.Sprintf(warningHeadStart, 600, 60, "shop/some")},
	} {
		for _, whenFull := range []string{whenFullWait, whenFullGate} {
			a := admit(key, c.asks, whenFull)
			_, arg, _ := strings.Cut(string(a.Patch), "--head-start-seconds=")
			arg, _, _ = strings.Cut(arg, "\"")
			if !a.Allowed || strings.TrimPrefix(c.args, "--head-start-seconds=") != arg {
				t.Errorf("%s: got %q, %+v", key, arg, a)
			}
			if warned := slices.Contains(a.Warnings, c.warning); warned != (c.warning != "") {
				t.Errorf("%s: got the warnings %q, want %q", key, a.Warnings, c.warning)
			}
		}
	}
	for asks, want := range map[string]string{
		"901": `head-start is "901": it must be a whole number from 0 to 900`,
		"-1":  `head-start is "-1": it must be a whole number from 0 to 900`,
		"":    `head-start is "": it must be`,
		"1h":  `head-start is "1h": it must be`,
	} {
		if a := admit("web", asks, whenFullWait); a.Allowed || a.Code != http.StatusUnprocessableEntity || !strings.Contains(a.Message, want) {
			t.Errorf("%q: got %+v, want %s", asks, a, want)
		}
	}
	want := `head-start is "600": with when-full deny, a pod stands in no line; choose wait or gate`
	if a := admit("web", "600", whenFullDeny); a.Allowed || a.Code != http.StatusUnprocessableEntity || !strings.Contains(a.Message, want) {
		t.Errorf("got %+v, want %s", a, want)
	}
}

// The number of tokens that a pod needs goes to its sidecar, if it can ever have so many.
func TestTokensOfAPod(t *testing.T) {
	t.Parallel()
	w, _ := ownersWebhook(t, rig.FreeAddress(t), "shop/set length=5 overtake=60\nshop/paused length=0\n")
	admit := func(key, tokens, whenFull string) rig.Admission {
		return w.admit(t, rig.Review(t, semaphoreID{"shop", key}, 8, func(request map[string]any) {
			a := rig.AnnotationsOf(request)
			a[annotationTokens], a[annotationWhenFull] = tokens, whenFull
			request["dryRun"] = key == "paused" // else Redis has to know the pause
		}))
	}
	for key, tokens := range map[string]string{"web": "8", "set": "5", "paused": "8", "one": "1"} {
		for _, whenFull := range []string{whenFullWait, whenFullGate} {
			a := admit(key, tokens, whenFull)
			if has := strings.Contains(string(a.Patch), `"--tokens=`+tokens+`"`); !a.Allowed || has != (tokens != "1") {
				t.Errorf("%s tokens of %s: got %d %s, %s", tokens, key, a.Code, a.Message, a.Patch)
			}
		}
	}
	for _, c := range []struct{ key, tokens, whenFull, want string }{
		{"web", "9", whenFullWait, `tokens is "9", and the length is 8: the pod could never run`},
		{"set", "8", whenFullGate, `tokens is "8", and the length is 5: the pod could never run`},
		{"web", "101", whenFullWait, `tokens is "101": it must be a whole number from 1 to 100`},
		{"web", "0", whenFullWait, `tokens is "0": it must be`},
		{"web", "two", whenFullWait, `tokens is "two": it must be`},
		{"web", "2", whenFullDeny, `tokens is "2": with when-full deny, a pod that needs several tokens would hardly ever`},
	} {
		if a := admit(c.key, c.tokens, c.whenFull); a.Code != http.StatusUnprocessableEntity || !strings.Contains(a.Message, c.want) {
			t.Errorf("%+v: got %+v", c, a)
		}
	}
}

// A pod in mode wait is admitted without a token and without Redis. Its sidecar acquires
// the token.
func TestWaitingPodIsAdmitted(t *testing.T) {
	for name, c := range map[string]struct {
		whenFull string
		change   []func(map[string]any)
	}{
		"by the flag":       {whenFullWait, nil},
		"by the annotation": {whenFullDeny, []func(map[string]any){whenFull(whenFullWait)}},
		"dry run":           {whenFullWait, []func(map[string]any){func(r map[string]any) { r["dryRun"] = true }}},
	} {
		config := testConfig(rig.FreeAddress(t))
		config.whenFull = c.whenFull
		w := startWebhook(t, config)
		id := freshID()
		a := w.admit(t, rig.Review(t, id, 3, c.change...))
		if !a.Allowed || a.Token != "" || !slices.Equal(a.Warnings, []string{warningWaits}) {
			t.Errorf("%s: got %+v", name, a)
		}
		args := `"--length=3","--expiration-seconds=10","--lock-mode=redlock",` +
			`"--redis-addresses=` + config.redisAddresses[0] + `","` + id.String() + `","$(POD_UID)"]`
		if patch := string(a.Patch); !strings.Contains(patch, args) {
			t.Errorf("%s: the patch is %s, want %s in it", name, patch, args)
		}
		want := verdictWait
		if c.change != nil && c.whenFull == whenFullWait {
			want = verdictDryRun
		}
		if lines := w.log.WantLines(t, "admission", 1); lines[0]["verdict"] != want || lines[0]["token"] != "" {
			t.Errorf("%s: logged %v", name, lines)
		}
	}
}

// The annotation overrides the flag.
func TestAnnotationDeniesDespiteFlag(t *testing.T) {
	c := testConfig(rig.CommonRedis(t).Address)
	c.whenFull = whenFullWait
	w := startWebhook(t, c)
	id := freshID()
	a := w.admit(t, rig.Review(t, id, 1, whenFull(whenFullDeny)))
	if !a.Allowed || a.Token == "" || len(a.Warnings) != 0 {
		t.Errorf("the first pod got %+v", a)
	}
	a = w.admit(t, rig.Review(t, id, 1, whenFull(whenFullDeny)))
	if a.Allowed || a.Code != http.StatusTooManyRequests {
		t.Errorf("the second pod got %+v", a)
	}
}

// The mode wait needs native sidecars. The message also names all other problems.
func TestWaitingWithClassicSidecarIsDenied(t *testing.T) {
	c := testConfig(rig.FreeAddress(t))
	c.enableSidecarContainers = false
	w := startWebhook(t, c)
	a := w.admit(t, rig.Review(t, freshID(), 1, whenFull(whenFullWait)))
	want := `invalid annotations: ` + annotationWhenFull + ` is "wait": this needs native sidecars, ` +
		`and the webhook injects classic ones (--enable-sidecar-containers=false)`
	if a.Allowed || a.Code != http.StatusUnprocessableEntity || a.Message != want {
		t.Errorf("got %+v, want %s", a, want)
	}
	a = w.admit(t, rig.Review(t, freshID(), 1, whenFull("queue"), func(r map[string]any) {
		rig.AnnotationsOf(r)[annotationLength] = "0"
	}))
	if a.Allowed || !strings.Contains(a.Message, annotationLength+` is "0"`) ||
		!strings.HasSuffix(a.Message, "; "+annotationWhenFull+` is "queue": it must be deny, wait or gate`) {
		t.Errorf("got %+v", a)
	}
}

// A pod that stops waiting says so to its sidecar. Where that would do nothing, or would
// start its wait again and again, the webhook refuses it.
func TestPodThatStopsWaiting(t *testing.T) {
	t.Parallel()
	w, _ := ownersWebhook(t, rig.FreeAddress(t), "shop/no length=3\nshop/yes length=3 when-waited=run")
	for key, warning := range map[string]string{"no": fmt.Sprintf(warningStays, "shop/no"), "yes": "", "other": ""} {
		a := w.admit(t, rig.Review(t, semaphoreID{"shop", key}, 3, whenFull(whenFullWait), func(r map[string]any) {
			own := rig.AnnotationsOf(r)
			own[annotationWait], own[annotationWhenWaited] = "60", whenWaitedRun
		}))
		runs := strings.Contains(string(a.Patch), `"--when-waited=run"`)
		if !a.Allowed || runs != (warning == "") || slices.Contains(a.Warnings, warning) == runs {
			t.Errorf("%s: got %+v", key, a)
		}
	}
	for _, c := range []struct{ whenFull, wait, then, policy, args, problem string }{
		{whenFullWait, "600", "", "Never", `"--wait-seconds=600","--when-waited=fail"`, ""},
		{whenFullGate, "600", "fail", "OnFailure", `"--wait-seconds=600","--when-waited=fail"`, ""},
		{whenFullWait, "604800", "run", "Always", `"--wait-seconds=604800","--when-waited=run"`, ""},
		{whenFullGate, "1", "run", "", `"--wait-seconds=1","--when-waited=run"`, ""},
		{whenFullWait, "", "", "Always", "", ""},
		{whenFullWait, "600", "", "Always", "", "wait-seconds needs restartPolicy Never or OnFailure, as the pod fails then: " +
			`with Always, it would wait again for ever; or set when-waited to "run"`},
		{whenFullGate, "600", "fail", "", "", "wait-seconds needs restartPolicy Never or OnFailure"},
		{whenFullDeny, "600", "run", "Never", "", `wait-seconds is for pods that wait: with when-full "deny", none does`},
		{whenFullWait, "", "run", "Never", "", "when-waited is not used without wait-seconds"},
		{whenFullWait, "600", "start", "Never", "", `when-waited is "start": it must be fail or run`},
	} {
		a := w.admit(t, rig.Review(t, freshID(), 1, whenFull(c.whenFull), func(r map[string]any) {
			for name, value := range map[string]string{annotationWait: c.wait, annotationWhenWaited: c.then} {
				if value != "" {
					rig.AnnotationsOf(r)[name] = value
				}
			}
			r["object"].(map[string]any)["spec"].(map[string]any)["restartPolicy"] = c.policy
		}))
		switch patch := string(a.Patch); {
		case c.problem != "":
			if a.Allowed || a.Code != http.StatusUnprocessableEntity || !strings.Contains(a.Message, c.problem) {
				t.Errorf("%+v: got %+v", c, a)
			}
		case !a.Allowed || !strings.Contains(patch, c.args) || c.args == "" && strings.Contains(patch, "wait-seconds"):
			t.Errorf("%+v: got %t %s, %s", c, a.Allowed, a.Message, patch)
		}
	}
}

// The creator of a Job or CronJob gets a warning that its pods may wait. Kubernetes asks
// for warnings of at most 120 characters.
func TestWarningsOfWaiting(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	for _, kind := range []string{"Job", "CronJob"} {
		for value, want := range map[string][]string{
			whenFullWait: {fmt.Sprintf(warningJobWaits, kind)}, whenFullGate: {fmt.Sprintf(warningJobGated, kind)}, whenFullDeny: nil,
		} {
			body := rig.Review(t, freshID(), 1, whenFull(value), asWorkload("CREATE", "batch", kind, nil))
			if a := w.admit(t, body); !a.Allowed || a.Patch != nil || !slices.Equal(a.Warnings, want) {
				t.Errorf("%s, %s: got %+v", kind, value, a)
			}
		}
	}
	for _, w := range []string{
		warningWaits, fmt.Sprintf(warningJobWaits, "CronJob"), fmt.Sprintf(warningJob, "CronJob"), warningNotCompleting,
		warningStatic, warningGated, fmt.Sprintf(warningJobGated, "CronJob"), warningNotGated, warningHostNetwork,
		fmt.Sprintf(warningGrace, 9, giveBackSeconds),
		fmt.Sprintf(warningForgotten, "shop-of-many-kinds-of-things"),
	} {
		if len(w) > 140 {
			t.Errorf("a warning has %d characters: %s", len(w), w)
		}
	}
}

// A pod copied from the YAML of an admitted pod does not keep the token of that pod.
func TestWaitingPodDropsCopiedToken(t *testing.T) {
	c := testConfig("redis:6379")
	object := fixtures(t)["deployment-pod.json"]
	admitted := mustJSON(t, patched(t, c, object, testToken))
	waiting := patched(t, c, admitted, "")
	annotations := waiting["metadata"].(map[string]any)["annotations"].(map[string]any)
	if token, ok := annotations[annotationToken]; ok {
		t.Errorf("the token annotation is %v", token)
	}
	sidecars := containers(waiting, "initContainers")
	args := sidecars[0].(map[string]any)["args"].([]any)
	if len(sidecars) != 2 || args[len(args)-1] != "$(POD_UID)" {
		t.Errorf("the sidecars are %v", sidecars)
	}
	if again := patched(t, c, mustJSON(t, waiting), ""); string(mustJSON(t, again)) != string(mustJSON(t, waiting)) {
		t.Errorf("a second patch changed the pod: %v", again)
	}
}

// With the etcd lock, the sidecar gets the etcd settings of the webhook, from the Secret
// of its own namespace. It can parse its arguments.
func TestPatchForEtcd(t *testing.T) {
	for name, c := range map[string]struct {
		etcd   etcdSettings
		args   []string
		env    string
		volume string
	}{
		"nothing": {etcdSettings{}, nil, "", ""},
		"password": {etcdSettings{username: "hook", password: rig.Password}, nil,
			"ETCD_USERNAME etcd/username, ETCD_PASSWORD etcd/password", ""},
		"all": {etcdSettings{username: "hook", password: rig.Password, caFile: "a", certFile: "b", keyFile: "c"},
			[]string{"--etcd-ca-file=" + etcdMountPath + "/ca.crt", "--etcd-cert-file=" + etcdMountPath + "/tls.crt",
				"--etcd-key-file=" + etcdMountPath + "/tls.key"},
			"ETCD_USERNAME etcd/username, ETCD_PASSWORD etcd/password", "ca.crt tls.crt tls.key"},
		"authority": {etcdSettings{caFile: "a"}, []string{"--etcd-ca-file=" + etcdMountPath + "/ca.crt"}, "", "ca.crt"},
	} {
		config := testConfig("redis:6379")
		config.lockMode, config.etcd = lockModeEtcd, c.etcd
		config.sidecarEtcdSecret, config.etcdAddresses = "etcd", []string{"e:1", "f:1"}
		object := mustJSON(t, patched(t, config, fixtures(t)["bare-pod.json"], testToken))
		object = mustJSON(t, patched(t, config, object, testToken)) // a pod copied from a patched one
		if strings.Contains(string(object), rig.Password) {
			t.Errorf("%s: the password is in %s", name, object)
		}
		var p corev1.Pod
		rig.Must(t, json.Unmarshal(object, &p))
		sidecar := p.Spec.InitContainers[0]
		want := append([]string{"--lock-mode=etcd", "--etcd-addresses=e:1,f:1"}, c.args...)
		if got := sidecar.Args[6 : len(sidecar.Args)-2]; !slices.Equal(got, want) {
			t.Errorf("%s: args %q, want %q", name, got, want)
		}
		var env, files []string
		for _, e := range sidecar.Env {
			if e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil {
				env = append(env, e.Name+" "+e.ValueFrom.SecretKeyRef.Name+"/"+e.ValueFrom.SecretKeyRef.Key)
			}
		}
		if got := strings.Join(env, ", "); got != c.env {
			t.Errorf("%s: the environment is %s", name, got)
		}
		var mounted []string
		for _, v := range p.Spec.Volumes {
			if v.Name == etcdVolumeName {
				mounted = append(mounted, v.Secret.SecretName)
				for _, i := range v.Secret.Items {
					files = append(files, i.Key)
				}
			}
		}
		if got := strings.Join(files, " "); got != c.volume ||
			c.volume != "" && !slices.Equal(mounted, []string{"etcd"}) ||
			(len(sidecar.VolumeMounts) > 0) != (c.volume != "") {
			t.Errorf("%s: volumes %v of %v, mounts %v", name, files, mounted, sidecar.VolumeMounts)
		}
	}
}

// The sidecar can parse the arguments that the patch gives it.
func TestSidecarReadsItsArguments(t *testing.T) {
	c := testConfig("redis:6379")
	c.redisAddresses = []string{"a:1", "b:2", "c:3"}
	spec := semaphoreSpec{length: 7, expiration: 12 * time.Second}
	sidecar, _ := sidecarContainer(c, corev1.ResourceRequirements{}, testID, spec, testToken)
	parsed, err := parseSidecarConfig(sidecar.Args[1:], func(name string) string {
		return map[string]string{"POD_UID": "uid"}[name]
	})
	rig.Must(t, err)
	if parsed.length != 7 || parsed.expiration != 12*time.Second || parsed.podUID != "uid" ||
		parsed.token != "uid" || parsed.takenAs != testToken ||
		parsed.lockMode != lockModeRedlock || !slices.Equal(parsed.redisAddresses, c.redisAddresses) {
		t.Errorf("parsed %+v", parsed)
	}
	c.enableSidecarContainers = false
	sidecar, _ = sidecarContainer(c, corev1.ResourceRequirements{}, testID, testSpec, testToken)
	parsed, err = parseSidecarConfig(sidecar.Args[1:], func(string) string { return "" })
	rig.Must(t, err)
	if parsed.length != 0 || parsed.token != testToken || parsed.takenAs != "" || sidecar.RestartPolicy != nil ||
		len(sidecar.Env) != 8 || sidecar.Env[5].Name != "POD_NAME" || sidecar.Env[6].Name != "NODE_NAME" ||
		sidecar.Env[7].Name != "POD_UID" {
		t.Errorf("a classic sidecar: %+v, %+v", parsed, sidecar)
	}
}

// A namespace without a Redis user gets a warning with the missing command. An
// installation that makes users by other means gets no warning.
func TestNamespaceWithoutRedisUser(t *testing.T) {
	t.Parallel()
	r := rig.StartRedis(t)
	setUser := func(name string, rules ...string) {
		t.Helper()
		password := ">" + rig.Password
		fields := rig.Anys(strings.Fields(strings.Join(rules, " ")))
		r.Do(t, "ACL", append([]any{"SETUSER", name, "on", password}, fields...)...)
	}
	setUser("webhook", rig.Ageless(webhookACL), "+role +cluster|slots")
	c := testConfig(r.Address)
	c.redis = redisSettings{username: "webhook", password: rig.Password}
	c.sidecarRedisSecret = "redis"
	warned := func(c webhookConfig) (w *testWebhook, warnings string) {
		t.Helper()
		w = startWebhook(t, c)
		return w, strings.Join(w.admit(t, rig.Review(t, semaphoreID{"shop", uuid.NewString()}, 1)).Warnings, "; ")
	}
	want := fmt.Sprintf(warningForgotten, "shop")
	for _, step := range []struct {
		what string
		do   func()
		want string
	}{
		{"the webhook may not list users", func() { setUser(userOfSetup) }, ""},
		{"no user for the namespace", func() { setUser("webhook", forgottenACL) }, want},
		{"another namespace's user", func() { setUser(namespaceUser("shop-2")) }, want},
		{"a user of no namespace", func() { setUser("sidecar") }, want},
		{"its own user", func() { setUser(namespaceUser("shop")) }, ""},
		{"users made by other means", func() { r.Do(t, "ACL", "DELUSER", userOfSetup, namespaceUser("shop")) }, ""},
	} {
		step.do()
		rig.Eventually(t, 10*time.Second, func() error { // a slow Redis causes no warning
			if _, got := warned(c); got != step.want {
				return fmt.Errorf("%s: got warnings %q, want %q", step.what, got, step.want)
			}
			return nil
		})
	}

	setUser(userOfSetup)
	for _, whenFull := range whenFullChoices {
		c.whenFull = whenFull
		rig.Eventually(t, 10*time.Second, func() error {
			w, got := warned(c)
			if !strings.HasPrefix(got, want) {
				return fmt.Errorf("%s: got warnings %q", whenFull, got)
			}
			a := w.admit(t, rig.Review(t, semaphoreID{"shop", "job"}, 1, asWorkload("CREATE", "batch", "Job", nil)))
			if len(a.Warnings) == 0 || a.Warnings[0] != want {
				return fmt.Errorf("a Job got warnings %q, want %q first", a.Warnings, want)
			}
			return nil
		})
	}

	// A running webhook notices a new user, and rarely lists the users of Redis.
	w, _ := warned(c)
	setUser(namespaceUser("shop"))
	rig.Eventually(t, 10*time.Second, func() error {
		a := w.admit(t, rig.Review(t, semaphoreID{"shop", "web"}, 1000))
		if strings.Contains(strings.Join(a.Warnings, "; "), want) {
			return errors.New("the webhook still warns")
		}
		w.users.mu.Lock()
		defer w.users.mu.Unlock()
		if !slices.Contains(w.users.names, namespaceUser("shop")) { // a slow Redis causes no warning, either
			return fmt.Errorf("the webhook knows the users %q", w.users.names)
		}
		return nil
	})
	before := r.CommandCalls(t)["acl|users"]
	for range 20 {
		w.admit(t, rig.Review(t, semaphoreID{"shop", "web"}, 1000))
	}
	if n := r.CommandCalls(t)["acl|users"] - before; n > 0 {
		t.Errorf("the webhook listed users %d times for 20 pods, want 0", n)
	}
}

// The parts of an admission, for benchstat: go test -run '^$' -bench . -count 10 . "make
// bench" measures it as a whole.

func benchmarkRequest(b *testing.B, change ...func(map[string]any)) *admissionRequest {
	b.Helper()
	r, err := decodeReview(rig.Review(b, freshID(), maxLength, change...))
	rig.Must(b, err)
	return r
}

func BenchmarkDecode(b *testing.B) {
	body := rig.Review(b, freshID(), maxLength)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		r, err := decodeReview(body)
		rig.Must(b, err)
		_, err = decodePod(r)
		rig.Must(b, err)
	}
}

// A decision without the token: decoding the pod, reading the annotations, and the patch.
func BenchmarkDecide(b *testing.B) {
	c := testConfig("127.0.0.1:6379") // never contacted
	s := newSemaphores(c.settings, nil, 1, slog.New(slog.DiscardHandler))
	defer s.queue.close()
	a := newAdmitter(c, s)
	r := benchmarkRequest(b, func(request map[string]any) { request["dryRun"] = true })
	b.ReportAllocs()
	for b.Loop() {
		d, err := a.decide(b.Context(), r)
		if err != nil || d.verdict != verdictDryRun {
			b.Fatalf("%s, %v", d.verdict, err)
		}
	}
}

func BenchmarkPatch(b *testing.B) {
	c := testConfig("127.0.0.1:6379")
	p, err := decodePod(benchmarkRequest(b))
	rig.Must(b, err)
	b.ReportAllocs()
	for b.Loop() {
		sidecarPatch(c, p, testID, testSpec, testToken)
	}
}

// One script acquires a token, another releases it.
func BenchmarkScript(b *testing.B) {
	c := testConfig(deployedRedis(b).Address)
	locks := newLocker(c.settings, lockConnections)
	s := newSemaphores(c.settings, locks, idleConnections, slog.New(slog.DiscardHandler))
	defer s.close(context.Background())
	id, pod := freshID(), newPodName("web-1", "")
	token, _, err := s.acquire(b.Context(), id, pod, maxLength, limit{}, 10*time.Second) // makes the tokens
	rig.Must(b, err)
	b.ReportAllocs()
	for b.Loop() {
		_, err := s.release(b.Context(), id, token, "")
		rig.Must(b, err)
		token = uuid.NewString()
		a, err := s.runAcquire(b.Context(), id, acquireRequest{token: token, length: maxLength, pod: pod})
		if err != nil || a.status != acquireTaken {
			b.Fatalf("acquire: got %+v, %v", a, err)
		}
	}
}

// annotated sets an annotation of the pod in a review.
func annotated(name, value string) func(map[string]any) {
	return func(request map[string]any) { rig.AnnotationsOf(request)[name] = value }
}

// Admissions without HTTP/2 and TLS, by verdict.
func BenchmarkAdmission(b *testing.B) {
	r := deployedRedis(b)
	for verdict, change := range map[string]func(map[string]any){
		verdictAdmitted: func(map[string]any) {},
		verdictWait:     annotated(annotationWhenFull, whenFullWait),
		verdictInvalid:  annotated(annotationLength, "many"),
		"none":          annotated(annotationEnabled, "false"),
	} {
		b.Run(verdict, func(b *testing.B) {
			w := startWebhook(b, testConfig(r.Address))
			w.webhook.log = slog.New(slog.NewJSONHandler(io.Discard, nil))
			handler, id := w.routes(), freshID()
			body := rig.Review(b, id, maxLength, change)
			n := 0
			b.ReportAllocs()
			for b.Loop() {
				if n++; n%5000 == 0 { // makes new tokens
					b.StopTimer()
					r.MakeFree(b, id, 5000)
					b.StartTimer()
				}
				request := httptest.NewRequest(http.MethodPost, mutatePath+"?timeout=10s", bytes.NewReader(body))
				request.Header.Set("Content-Type", "application/json")
				answer := httptest.NewRecorder()
				if handler.ServeHTTP(answer, request); answer.Code != http.StatusOK {
					b.Fatal(answer.Body)
				}
			}
		})
	}
}

// deployedRedis starts a Redis that writes its file like the one in deploy/.
func deployedRedis(t testing.TB) *rig.Redis {
	t.Helper()
	r := rig.StartRedis(t)
	r.Do(t, "CONFIG", "SET", "appendfsync", "everysec")
	return r
}

// Parsed annotations are within bounds; any problem names its annotation.
func FuzzAnnotations(f *testing.F) {
	f.Add("web", "3", "10", "wait")
	f.Add("a/b", "10000", "3600", "deny")
	f.Add("/", "-1", "0x10", "")
	f.Fuzz(func(t *testing.T, key, length, expiration, whenFull string) {
		spec, problems := parseAnnotations("shop", map[string]string{annotationKey: key, annotationLength: length,
			annotationExpiration: expiration, annotationWhenFull: whenFull}, whenFullDeny, time.Hour, ownerSettings{})
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

// Without --semaphores-file, nothing is read, and nothing is set.
func TestNoSemaphoresFile(t *testing.T) {
	f := newOwnerFile("", slog.New(slog.DiscardHandler), func() { t.Error("there are other settings") })
	f.watch(t.Context(), time.Millisecond) // returns at once
	if s, err := f.settings(); err != nil || len(s.lines) != 0 {
		t.Errorf("settings %v, %v", s, err)
	}
}
