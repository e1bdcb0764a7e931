package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	kjson "sigs.k8s.io/json"
)

// scannedRight reports whether the scanner reads a document. It fails if the result
// differs from encoding/json.
func scannedRight(t *testing.T, body []byte) bool {
	t.Helper()
	got, ok := scanReview(body)
	if !ok {
		return false
	}
	var want admissionReview
	if err := json.Unmarshal(body, &want); err != nil {
		t.Fatalf("the scanner reads what encoding/json refuses (%v): %q", err, body)
	}
	if want.Request != nil && want.Request.Object != nil {
		want.Request.pod = new(pod)
		if err := json.Unmarshal(want.Request.Object, want.Request.pod); err != nil {
			t.Fatalf("the scanner reads what encoding/json refuses (%v): %q", err, body)
		}
	}
	if !reflect.DeepEqual(got, want) {
		gotText, _ := json.Marshal(got)
		wantText, _ := json.Marshal(want)
		t.Fatalf("%q is\n%s %+v, want\n%s %+v", body, gotText, got.Request, wantText, want.Request)
	}
	return true
}

// The scanner reads what API servers send, with the same result as encoding/json.
func TestScan(t *testing.T) {
	t.Parallel()
	for name, body := range reviews(t) {
		body = bytes.TrimSpace(body)
		if !scannedRight(t, body) {
			t.Errorf("%v is not scanned", name)
		}
		var indented bytes.Buffer
		rig.Must(t, json.Indent(&indented, body, "\t", "  "))
		if !scannedRight(t, indented.Bytes()) {
			t.Errorf("%v is not scanned when indented", name)
		}
		for cut := 0; cut < len(body); cut += 13 { // the scanner reads no truncated review
			if _, ok := scanReview(body[:cut]); ok {
				t.Fatalf("%v is scanned though truncated: %q", name, body[:cut])
			}
		}
	}
}

// Documents that the scanner reads, and others that it leaves to encoding/json.
var (
	scannedDocuments = []string{
		`{"request":{"uid":"\u00e4\n","object":{"metadata":{"annotations":{"a\"":"ü","a":"1","a":"2"}}}}}`,
		`{"request":{"uid":"1","uid":"2","dryRun":true,"dryRun":false,` +
			`"x":[1,-0.5e+3,0,{},[],[[]],true,null,"\ud800"],"object":{}}}`,
		`{"request":{"object":{"spec":{"initContainers":[],"os":{"name":"linux","name":"windows"},` +
			`"terminationGracePeriodSeconds":-1}}}}`,
		`{"request":{"object":{"spec":{"containers":[{"name":"a","resources":{"limits":{"cpu":1}}},` +
			`{"resources":{}}],"resources":null}}}}`,
		`{"request":{"object":{"spec":{"hostNetwork":true,"dnsPolicy":"None","hostNetwork": false}}}}`,
		`{}`, " {\"request\" :\r\n{ }}\t ", "{\"a\":\"\xff\"}",
	}
	otherDocuments = []string{
		``, `null`, `[]`, `"`, `{`, `{}{}`, `{,}`, `{"a":1,}`, `{"a"}`, `{"a":}`, `{a:1}`,
		`{"a":01}`, `{"a":1.}`, `{"a":+1}`, `{"a":1e}`, `{"a":-}`, `{"a":nul}`,
		`{"a":"\x"}`, `{"a":"\u00g0"}`, "{\"a\":\"\n\"}", `{"a":[1,]}`, `{"a":[,1]}`, `{"a":[1 2]}`, `{"a":tru`,
		"{\"a\":1\x00}", "{}\x00", `{"Request":{}}`, `{"request":null}`, `{"request":{},"request":{}}`,
		`{"request":{"object":null}}`, `{"request":{"object":[]}}`, `{"request":{"uid":1}}`,
		`{"request":{"dryRun":null}}`, `{"request":{"object":{"spec":{"hostNetwork":null}}}}`, `{"request":{"object":{"spec":{"containers":[],"containers":[]}}}}`,
		`{"request":{"object":{"spec":{"containers":{}}}}}`,
		`{"request":{"object":{"spec":{"terminationGracePeriodSeconds":1.5}}}}`,
		`{"request":{"object":{"spec":{"terminationGracePeriodSeconds":9223372036854775808}}}}`,
		`{"request":{"object":{"spec":{"resources":{"limits":{"cpu":"much"}}}}}}`,
		`{"request":{"ob\u006aect":{}}}`, "{\"request\":{\"\u212aind\":{}}}",
	}
)

func TestScanLeavesTheRest(t *testing.T) {
	for _, d := range scannedDocuments {
		if !scannedRight(t, []byte(d)) {
			t.Errorf("not scanned: %s", d)
		}
	}
	deep := strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth)
	for _, d := range append(otherDocuments, `{"a":`+deep+`}`) {
		if _, ok := scanReview([]byte(d)); ok {
			t.Errorf("scanned: %s", d)
		}
	}
}

// Whatever the scanner reads, it reads like encoding/json.
func FuzzScan(f *testing.F) {
	for _, body := range reviews(f) {
		f.Add(body)
	}
	for _, d := range append(scannedDocuments, otherDocuments...) {
		f.Add([]byte(d))
	}
	f.Fuzz(func(t *testing.T, body []byte) { scannedRight(t, body) })
}

// shortWarnings returns the warnings without our prefix.
func shortWarnings(a rig.Admission) []string {
	var short []string
	for _, w := range a.Warnings {
		short = append(short, strings.ReplaceAll(w, annotationPrefix, ""))
	}
	return short
}

// The creator of a Deployment whose updates would wait for ever for a token gets a
// warning.
func TestWarningOfStuckUpdates(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.FreeAddress(t)))
	for _, c := range []struct {
		replicas, length   int
		surge, unavailable any
		enough             int // 0: the update ends
	}{
		{3, 3, "25%", "25%", 1}, {3, 3, 0, 1, 0}, {3, 3, 1, 1, 0}, {1, 1, "25%", "25%", 1}, {1, 2, "25%", "25%", 0},
		{5, 3, "25%", "25%", 3}, {5, 3, 0, 2, 3}, {5, 3, 0, 3, 0}, {5, 3, 2, "60%", 0}, {5, 3, 2, "59%", 3},
		{4, 5, 0, 1, 0}, {4, 5, 1, 0, 0}, {0, 1, "25%", "25%", 0}, {8, 8, "25%", "25%", 0},
	} {
		roll := func(request map[string]any) {
			spec := request["object"].(map[string]any)["spec"].(map[string]any)
			spec["replicas"] = c.replicas
			spec["strategy"] = map[string]any{"type": "RollingUpdate",
				"rollingUpdate": map[string]any{"maxSurge": c.surge, "maxUnavailable": c.unavailable}}
		}
		var want []string
		if c.enough > 0 {
			want = []string{fmt.Sprintf("on %d tokens, maxUnavailable must be at least %d, not ", c.length, c.enough)}
		}
		a := w.admit(t, rig.Review(t, freshID(), c.length, asWorkload("CREATE", "apps", "Deployment", nil), roll))
		if len(a.Warnings) != len(want) || len(want) > 0 && !strings.Contains(a.Warnings[0], want[0]) {
			t.Errorf("%+v: got %q, want %q", c, a.Warnings, want)
		}
	}
}

// The creator of a Job that may fail before the line has come to it gets a warning.
func TestWarningOfDeadlines(t *testing.T) {
	t.Parallel()
	r, s, id := newSemaphore(t)
	w := startWebhook(t, testConfig(r.Address))
	warned := func(kind string, deadline int) bool {
		t.Helper()
		a := w.admit(t, rig.Review(t, id, 1, asWorkload("CREATE", "batch", kind, nil), func(request map[string]any) {
			spec := request["object"].(map[string]any)["spec"].(map[string]any)
			if kind == "CronJob" {
				spec = spec["jobTemplate"].(map[string]any)["spec"].(map[string]any)
			}
			spec["activeDeadlineSeconds"] = deadline
		}))
		want := fmt.Sprintf("this %s may fail in line: its activeDeadlineSeconds is %d, and a pod that comes now waits for about 6 min",
			kind, deadline)
		if !a.Allowed || len(a.Warnings) > 1 || len(a.Warnings) == 1 && a.Warnings[0] != want {
			t.Errorf("got %+v, warnings %q", a, a.Warnings)
		}
		return len(a.Warnings) > 0
	}
	if warned("Job", 1) {
		t.Error("a semaphore that Redis does not know")
	}
	seedHolds(t, r, id, acquire(t, s, id, 1))
	for _, kind := range []string{"Job", "CronJob"} {
		rig.Eventually(t, 10*time.Second, func() error { // a slow Redis causes no warning
			if !warned(kind, 300) {
				return fmt.Errorf("%s: no warning of a deadline of 300 s", kind)
			}
			return nil
		})
		if warned(kind, 500) || warned(kind, 0) {
			t.Errorf("%s: a warning of a deadline of 500 s, or of none", kind)
		}
	}

	// With pods of two tokens: the one in line takes both of the holder's.
	two := freshID()
	maintain(t, s, two, 2)
	holder, err := s.runAcquire(t.Context(), two, acquireRequest{token: "holder", length: 2, tokens: 2})
	rig.Must(t, err)
	line, err := s.runAcquire(t.Context(), two, acquireRequest{token: "waiter", length: 2, tokens: 2, arrival: joinLine})
	rig.Must(t, err)
	if holder.status != acquireTaken || line.status != acquireFull {
		t.Fatalf("got %+v and %+v", holder, line)
	}
	seedHolds(t, r, two, "holder")
	rig.Eventually(t, 10*time.Second, func() error {
		a := w.admit(t, rig.Review(t, two, 2, asWorkload("CREATE", "batch", "Job", nil), func(request map[string]any) {
			request["object"].(map[string]any)["spec"].(map[string]any)["activeDeadlineSeconds"] = 500
		}))
		if len(a.Warnings) != 1 || !strings.Contains(a.Warnings[0], "is 500, and a pod that comes now waits for about 1") {
			return fmt.Errorf("behind a pod of two tokens: %q", a.Warnings)
		}
		return nil
	})
}

// wantWarned checks that an object is allowed unpatched, with these warnings, and without
// Redis.
func wantWarned(t *testing.T, w *testWebhook, what string, body []byte, want ...string) {
	t.Helper()
	a := w.admit(t, body)
	if got := shortWarnings(a); !a.Allowed || a.Patch != nil || !slices.Equal(got, want) {
		t.Errorf("%s: got %+v, warnings %q, want %q", what, a, got, want)
	}
	for _, text := range a.Warnings {
		if len(text) > 256 {
			t.Errorf("%s: a warning has %d characters: %s", what, len(text), text)
		}
	}
}

// setAnnotations sets annotations under our prefix; of a value "-", it removes the annotation.
func setAnnotations(change map[string]string) func(map[string]any) {
	return func(request map[string]any) {
		for name, value := range change {
			rig.AnnotationsOf(request)[annotationPrefix+name] = value
			if value == "-" {
				delete(rig.AnnotationsOf(request), annotationPrefix+name)
			}
		}
	}
}

// The creator of a pod gets a warning if its annotations do not count. Such a pod runs
// uncounted.
func TestWarningOfAnUncountedPod(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.FreeAddress(t))) // no Redis
	const enabled = "at-least-semaphore-pod"
	for value, want := range map[string]string{
		"True": `is "True"`, "yes": `is "yes"`, "1": `is "1"`, "": `is ""`, "true ": `is "true "`,
		strings.Repeat("\x00", 300): `is "` + strings.Repeat(`\x00`, 40),
	} {
		body := rig.Review(t, freshID(), 1, setAnnotations(map[string]string{enabled: value}))
		if len(value) > 9 { // the warning is cut
			if got := shortWarnings(w.admit(t, body)); len(got) != 1 || !strings.HasPrefix(got[0], enabled+" "+want) ||
				len(got[0])+len(annotationPrefix) != 256 {
				t.Errorf("%q: got %q", value, got)
			}
			continue
		}
		wantWarned(t, w, value, body, enabled+" "+want+`: the pod runs uncounted; write "true"`)
	}
	wantWarned(t, w, "missing", rig.Review(t, freshID(), 1, setAnnotations(map[string]string{enabled: "-"})),
		enabled+` is missing: the pod runs uncounted; add it as "true"`)
	wantWarned(t, w, "misspelt", rig.Review(t, freshID(), 1, setAnnotations(map[string]string{
		enabled: "-", "At-Least-Semaphore-Pods": "true"})),
		"At-Least-Semaphore-Pods is unknown: did you mean at-least-semaphore-pod?",
		enabled+` is missing: the pod runs uncounted; add it as "true"`)
	wantWarned(t, w, "false", rig.Review(t, freshID(), 0, setAnnotations(map[string]string{enabled: "false"})))
	if log := w.log.String(); log != "" {
		t.Errorf("logged %s", log)
	}
}

// The creator of a pod gets a warning of an unknown annotation, whether the webhook admits
// or refuses the pod. A near name is proposed.
func TestWarningOfUnknownAnnotations(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.CommonRedis(t).Address))
	for name, want := range map[string]string{
		"lenght": ": did you mean length?", "Length": ": did you mean length?", "kye": ": did you mean key?",
		"whenFull": ": did you mean when-full?", "when_full": ": did you mean when-full?",
		"expirations": ": did you mean expiration?", "priority": "", "keeys": "", "": "",
	} {
		for allowed, change := range map[bool]map[string]string{true: {name: "1"}, false: {name: "1", "length": "-"}} {
			a := w.admit(t, rig.Review(t, freshID(), 1, setAnnotations(change)))
			if got := shortWarnings(a); a.Allowed != allowed || !slices.Equal(got, []string{name + " is unknown" + want}) {
				t.Errorf("%q: allowed %v, warnings %q", name, a.Allowed, got)
			}
		}
	}
	many := map[string]string{}
	for n := range 100 {
		many[fmt.Sprintf("%03d%s", n, strings.Repeat("x", 300))] = "1"
	}
	a := w.admit(t, rig.Review(t, freshID(), 1, setAnnotations(many)))
	if got := shortWarnings(a); !a.Allowed || len(got) != 5 || got[4] != "004"+strings.Repeat("x", 60)+" is unknown" {
		t.Errorf("of many: got %q", got)
	}
}

// asWorkload turns a request to create a pod into one to create or update an object with
// the pod as its template. own are the annotations of the object itself.
func asWorkload(operation, group, kind string, own map[string]string) func(map[string]any) {
	return func(request map[string]any) {
		request["operation"] = operation
		request["kind"] = map[string]any{"group": group, "version": "v1", "kind": kind}
		spec := map[string]any{"template": request["object"], "replicas": 3}
		if kind == "CronJob" {
			spec = map[string]any{"jobTemplate": map[string]any{"spec": spec}, "schedule": "* * * * *"}
		}
		annotations := map[string]string{}
		for name, value := range own {
			annotations[annotationPrefix+name] = value
		}
		request["object"] = map[string]any{"spec": spec,
			"metadata": map[string]any{"name": "web", "annotations": annotations}}
	}
}

// workloadKinds are the kinds with a pod template, and where it is.
var workloadKinds = map[[2]string]string{
	{"apps", "Deployment"}: "spec.template", {"apps", "StatefulSet"}: "spec.template",
	{"apps", "DaemonSet"}: "spec.template", {"apps", "ReplicaSet"}: "spec.template",
	{"", "ReplicationController"}: "spec.template", {"batch", "Job"}: "spec.template",
	{"batch", "CronJob"}: "spec.jobTemplate.spec.template",
}

// The creator of a Deployment, or of another object with a pod template, gets warnings if
// its annotations are in the wrong place, are misspelt, or have wrong values.
func TestWarningsOfWorkloads(t *testing.T) {
	t.Parallel()
	w := startWebhook(t, testConfig(rig.FreeAddress(t))) // no Redis
	all := map[string]string{"at-least-semaphore-pod": "true", "key": "web", "length": "3", "expiration": "10"}
	none := maps.Clone(all)
	for name := range none {
		none[name] = "-"
	}
	for kind, template := range workloadKinds {
		for _, operation := range []string{"CREATE", "UPDATE"} {
			what := operation + " " + kind[1]
			refused := "the pods of this " + kind[1] + " will be refused: "
			workload := func(own, pod map[string]string) []byte {
				return rig.Review(t, freshID(), 1, setAnnotations(pod), asWorkload(operation, kind[0], kind[1], own))
			}
			misplaced := fmt.Sprintf("* does nothing on a %s: move it to %s.metadata", kind[1], template)
			wantWarned(t, w, what+" that is right", workload(nil, nil))
			wantWarned(t, w, what+" without annotations", workload(nil, none))
			wantWarned(t, w, what+" with its own", workload(all, none), misplaced)
			wantWarned(t, w, what+" with all twice", workload(all, nil))
			wantWarned(t, w, what+" with one misplaced", workload(all, map[string]string{"length": "-"}), misplaced,
				refused+"length is missing: it must be a whole number from 1 to 10000, "+
					"unless the ConfigMap semaphores sets a length for this key")
			wantWarned(t, w, what+" that is disabled", workload(nil, map[string]string{
				"at-least-semaphore-pod": "false", "length": "0"}))
			wantWarned(t, w, what+" with a wrong template", workload(nil, map[string]string{
				"at-least-semaphore-pod": "True", "lenght": "3"}), "lenght is unknown: did you mean length?",
				`at-least-semaphore-pod is "True": the pod runs uncounted; write "true"`)
			wantWarned(t, w, what+" with wrong values", workload(nil, map[string]string{
				"length": "many", "when-full": "queue"}),
				refused+`length is "many": it must be a whole number from 1 to 10000`,
				refused+`when-full is "queue": it must be deny, wait or gate`)
			wantWarned(t, w, what+" with a short grace period", rig.Review(t, freshID(), 1, func(request map[string]any) {
				request["object"].(map[string]any)["spec"].(map[string]any)["terminationGracePeriodSeconds"] = 5
			}, asWorkload(operation, kind[0], kind[1], nil)), fmt.Sprintf(warningGrace, 5, giveBackSeconds))
		}
	}
	wantWarned(t, w, "deletion", rig.Review(t, freshID(), 0, asWorkload("DELETE", "apps", "Deployment", all)))
	wantWarned(t, w, "another kind", rig.Review(t, freshID(), 0, asWorkload("CREATE", "apps", "Other", all)))
	wantWarned(t, w, "Windows", rig.Review(t, freshID(), 1, func(request map[string]any) {
		request["object"].(map[string]any)["spec"].(map[string]any)["os"] = map[string]any{"name": "windows"}
	}, asWorkload("CREATE", "apps", "Deployment", nil)),
		"the pods of this Deployment will be refused: "+deniedWindows)
	wantWarned(t, w, "CronJob with annotations of its Jobs", rig.Review(t, freshID(), 1, setAnnotations(none),
		asWorkload("CREATE", "batch", "CronJob", nil), func(request map[string]any) {
			spec := request["object"].(map[string]any)["spec"].(map[string]any)
			spec["jobTemplate"].(map[string]any)["metadata"] = map[string]any{
				"annotations": map[string]string{annotationKey: "web"}}
		}), "* does nothing on a CronJob: move it to spec.jobTemplate.spec.template.metadata")
	if log := w.log.String(); log != "" {
		t.Errorf("logged %s", log)
	}
}

// A pod in the host's network that asks the DNS of its node gets a warning, and so does a
// workload with such a template, whose pods are created by a controller.
func TestWarningOfAPodThatMayNotFindRedis(t *testing.T) {
	w := startWebhook(t, testConfig(rig.FreeAddress(t))) // no Redis
	for _, c := range []struct {
		hostNetwork bool
		dnsPolicy   corev1.DNSPolicy
		want        []string
	}{
		{true, corev1.DNSClusterFirst, []string{warningHostNetwork}},
		{true, corev1.DNSDefault, []string{warningHostNetwork}},
		{true, corev1.DNSClusterFirstWithHostNet, nil},
		{true, corev1.DNSNone, nil}, // the pod has a dnsConfig
		{false, corev1.DNSClusterFirst, nil},
	} {
		change := func(request map[string]any) {
			request["dryRun"] = true
			spec := request["object"].(map[string]any)["spec"].(map[string]any)
			spec["hostNetwork"], spec["dnsPolicy"] = c.hostNetwork, c.dnsPolicy
		}
		if a := w.admit(t, rig.Review(t, freshID(), 1, change)); !a.Allowed || !slices.Equal(a.Warnings, c.want) {
			t.Errorf("hostNetwork %t, %s: got %+v", c.hostNetwork, c.dnsPolicy, a)
		}
		for kind := range workloadKinds {
			wantWarned(t, w, fmt.Sprint(kind[1], c.hostNetwork, c.dnsPolicy),
				rig.Review(t, freshID(), 1, change, asWorkload("CREATE", kind[0], kind[1], nil)), c.want...)
		}
	}
}

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
