package main

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
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
		`{}`, " {\"request\" :\r\n{ }}\t ", "{\"a\":\"\xff\"}",
	}
	otherDocuments = []string{
		``, `null`, `[]`, `"`, `{`, `{}{}`, `{,}`, `{"a":1,}`, `{"a"}`, `{"a":}`, `{a:1}`,
		`{"a":01}`, `{"a":1.}`, `{"a":+1}`, `{"a":1e}`, `{"a":-}`, `{"a":nul}`,
		`{"a":"\x"}`, `{"a":"\u00g0"}`, "{\"a\":\"\n\"}", `{"a":[1,]}`, `{"a":[,1]}`, `{"a":[1 2]}`, `{"a":tru`,
		"{\"a\":1\x00}", "{}\x00", `{"Request":{}}`, `{"request":null}`, `{"request":{},"request":{}}`,
		`{"request":{"object":null}}`, `{"request":{"object":[]}}`, `{"request":{"uid":1}}`,
		`{"request":{"dryRun":null}}`, `{"request":{"object":{"spec":{"containers":[],"containers":[]}}}}`,
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
