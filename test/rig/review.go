package rig

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
)

// Names in Kubernetes objects.
const (
	AnnotationPrefix     = "at-least-semaphore-pod-hook.kaidotio.github.io/"
	AnnotationEnabled    = AnnotationPrefix + "at-least-semaphore-pod"
	AnnotationKey        = AnnotationPrefix + "key"
	AnnotationLength     = AnnotationPrefix + "length"
	AnnotationExpiration = AnnotationPrefix + "expiration"
	AnnotationWhenFull   = AnnotationPrefix + "when-full"
	AnnotationTokens     = AnnotationPrefix + "tokens"
	AnnotationHeadStart  = AnnotationPrefix + "head-start"
	AnnotationWait       = AnnotationPrefix + "wait-seconds"
	AnnotationWhenWaited = AnnotationPrefix + "when-waited"
	AnnotationToken      = AnnotationPrefix + "token"
	GateName             = AnnotationPrefix + "token" // a scheduling gate
	LabelGated           = AnnotationPrefix + "gated"

	SidecarName = "at-least-semaphore-pod-sidecar"
	AwaitName   = "at-least-semaphore-pod-await"
)

// The values of AnnotationWhenFull.
const (
	WhenFullDeny = "deny"
	WhenFullWait = "wait"
	WhenFullGate = "gate"
)

// ExitGaveUp is the exit code of an await whose pod gave up waiting.
const ExitGaveUp = 75

// MaxLength is the greatest length that a pod may ask for.
const MaxLength = 10000

// Fixture returns an AdmissionReview of a real API server; see
// test/testdata/admission-reviews.
func Fixture(t testing.TB, name string) map[string]any {
	t.Helper()
	var review map[string]any
	Must(t, json.Unmarshal([]byte(ReadFile(t, FixtureFolder+"/"+name)), &review))
	return review
}

// FixtureFolder holds the fixtures. It is a path from the root.
const FixtureFolder = "test/testdata/admission-reviews"

// Review makes the AdmissionReview of a Deployment's pod from one of a real API server.
func Review(t testing.TB, id fmt.Stringer, length int, change ...func(request map[string]any)) []byte {
	t.Helper()
	review := Fixture(t, "deployment-pod.json")
	request := review["request"].(map[string]any)
	request["namespace"] = idOf(id).Namespace
	maps.Copy(AnnotationsOf(request), map[string]any{
		AnnotationKey: idOf(id).Key, AnnotationLength: strconv.Itoa(length), AnnotationExpiration: "10"})
	for _, c := range change {
		c(request)
	}
	return JSON(t, review)
}

// AnnotationsOf returns the annotations of the pod in a request.
func AnnotationsOf(request map[string]any) map[string]any {
	return request["object"].(map[string]any)["metadata"].(map[string]any)["annotations"].(map[string]any)
}

// Admission is the webhook's answer.
type Admission struct {
	Allowed  bool
	Code     int32
	Message  string
	Warnings []string
	Audit    map[string]string
	Token    string // the token that the patch gives the pod
	Patch    []byte
}

// ReadAdmission parses the answer of a webhook.
func ReadAdmission(status int, text string) (Admission, error) {
	if status != http.StatusOK {
		return Admission{}, fmt.Errorf("status %d: %s", status, text)
	}
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal([]byte(text), &review); err != nil {
		return Admission{}, err
	}
	answer := review.Response
	a := Admission{Allowed: answer.Allowed, Patch: answer.Patch, Warnings: answer.Warnings,
		Audit: answer.AuditAnnotations}
	if r := answer.Result; r != nil {
		a.Code, a.Message = r.Code, r.Message
	}
	steps, err := readPatch(a.Patch)
	for _, s := range steps {
		if s.Path == "/metadata/annotations/"+escape(AnnotationToken) {
			a.Token, _ = s.Value.(string)
		}
	}
	return a, err
}

// patchStep is a step of a JSON patch.
type patchStep struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

func readPatch(patch []byte) (steps []patchStep, err error) {
	if patch != nil {
		err = json.Unmarshal(patch, &steps)
	}
	return steps, err
}

// escape escapes a name for a JSON pointer.
func escape(name string) string { return strings.NewReplacer("~", "~0", "/", "~1").Replace(name) }

// PatchedPod returns the pod of a review with the patch applied.
func PatchedPod(review, patch []byte) (*corev1.Pod, error) {
	var r struct {
		Request struct{ Object json.RawMessage }
	}
	if err := json.Unmarshal(review, &r); err != nil {
		return nil, err
	}
	steps, err := jsonpatch.DecodePatch(patch)
	if err != nil {
		return nil, err
	}
	text, err := steps.Apply(r.Request.Object)
	if err != nil {
		return nil, err
	}
	pod := new(corev1.Pod)
	return pod, json.Unmarshal(text, pod)
}
