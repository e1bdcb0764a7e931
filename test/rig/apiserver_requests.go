package rig

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Respond writes an object, or the Status unless it is nil.
func Respond(w http.ResponseWriter, code int, object any, status *metav1.Status) {
	if status != nil {
		status.TypeMeta, status.Status = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, metav1.StatusFailure
		code, object = int(status.Code), status
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(object)
}

// Failure returns the Status of a failed request.
func Failure(code int32, reason metav1.StatusReason, format string, args ...any) *metav1.Status {
	return &metav1.Status{Code: code, Reason: reason, Message: fmt.Sprintf(format, args...)}
}

func (s *APIStore) serveCreate(w http.ResponseWriter, r *http.Request) {
	p := new(corev1.Pod)
	if err := json.NewDecoder(r.Body).Decode(p); err != nil {
		Respond(w, 0, nil, Failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v", err))
		return
	}
	p.Namespace = r.PathValue("namespace")
	created, status := s.Create(p)
	Respond(w, http.StatusCreated, created, status)
}

// servePatch accepts JSON patches. Like a real API server, it allows a patch to remove
// gates but not to add them, and responds with 422 if a test fails or the policy refuses.
func (s *APIStore) servePatch(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	steps, wrong := jsonpatch.DecodePatch(body)
	if err != nil || wrong != nil || r.Header.Get("Content-Type") != "application/json-patch+json" {
		Respond(w, 0, nil, Failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "not a JSON patch: %v", wrong))
		return
	}
	var status *metav1.Status
	after, missing := s.Change(r.PathValue("namespace"), r.PathValue("name"), func(p *corev1.Pod) {
		var patched *corev1.Pod
		patched, status = applySteps(p, steps, strings.HasSuffix(r.URL.Path, "/status"))
		if status == nil && s.policy != nil {
			if refusal := s.policy(p, patched); refusal != "" {
				status = Failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "pods %q is forbidden: "+
					"ValidatingAdmissionPolicy 'test' with binding 'test' denied request: %s", p.Name, refusal)
			}
		}
		if status == nil {
			*p = *patched
		}
	})
	Respond(w, http.StatusOK, after, cmp.Or(missing, status))
}

// applySteps applies a patch to a pod, or to its status, which is a subresource.
func applySteps(p *corev1.Pod, steps jsonpatch.Patch, toStatus bool) (*corev1.Pod, *metav1.Status) {
	text, err := json.Marshal(p)
	if err == nil {
		text, err = steps.Apply(text)
	}
	if err != nil {
		return nil, Failure(http.StatusUnprocessableEntity, "", "%v", err)
	}
	patched := new(corev1.Pod)
	if err := json.Unmarshal(text, patched); err != nil {
		return nil, Failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v", err)
	}
	for _, g := range patched.Spec.SchedulingGates {
		if !slices.Contains(p.Spec.SchedulingGates, g) {
			return nil, Failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid,
				"spec.schedulingGates: only deletion is allowed")
		}
	}
	if patched.Spec.NodeName != p.Spec.NodeName || patched.UID != p.UID {
		return nil, Failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "field is immutable")
	}
	if toStatus {
		changed := p.DeepCopy()
		changed.Status = patched.Status
		return changed, nil
	}
	patched.Status = p.Status
	return patched, nil
}

func (s *APIStore) serveEvent(w http.ResponseWriter, r *http.Request) {
	var e eventsv1.Event
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
		Respond(w, 0, nil, Failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%v", err))
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var status *metav1.Status
	switch same := func(other eventsv1.Event) bool { return other.Namespace == e.Namespace && other.Name == e.Name }; {
	case e.EventTime.IsZero() || e.ReportingController == "" || e.ReportingInstance == "" ||
		e.Action == "" || e.Reason == "" || e.Type != corev1.EventTypeNormal && e.Type != corev1.EventTypeWarning ||
		len(e.Note) >= 1024 || e.Regarding.Namespace != e.Namespace ||
		len(validation.IsDNS1123Subdomain(e.Name)) > 0:
		status = Failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "Event %q is invalid", e.Name)
	case slices.ContainsFunc(s.events, same):
		status = Failure(http.StatusConflict, metav1.StatusReasonAlreadyExists,
			"events.events.k8s.io %q already exists", e.Name)
	default:
		s.events = append(s.events, e)
	}
	Respond(w, http.StatusCreated, e, status)
}
