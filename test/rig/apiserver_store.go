package rig

import (
	"cmp"
	"net/http"
	"slices"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// APIStore holds objects of Kubernetes, and serves them like a real API server: lists in
// pages of one version, watches from a version with bookmarks and a bounded history, JSON
// patches, and updates of a version. Nothing schedules or runs the pods: see Change.
type APIStore struct {
	*http.ServeMux
	*Collection[*corev1.Pod]
	Secrets    *Collection[*corev1.Secret]
	ConfigMaps *Collection[*corev1.ConfigMap]
	Namespaces *Collection[*corev1.Namespace] // pods need none
	Webhooks   *Collection[*admissionv1.MutatingWebhookConfiguration]

	events []eventsv1.Event
	policy PodPolicy // nil: accepts all patches
}

// PodPolicy judges a patch that has been applied, as a ValidatingAdmissionPolicy does. It
// returns why it refuses the patch; empty if it accepts.
type PodPolicy func(before, after *corev1.Pod) (refusal string)

// SetPolicy sets the policy; nil accepts all patches. Without another reason in its
// manifest, a policy answers "Invalid", with the code 422.
func (s *APIStore) SetPolicy(p PodPolicy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policy = p
}

// NewAPIStore makes an empty store.
func NewAPIStore() *APIStore {
	s := &APIStore{ServeMux: http.NewServeMux(), Collection: newCollection[corev1.Pod]("v1", "Pod", "pods"),
		Secrets:    newCollection[corev1.Secret]("v1", "Secret", "secrets"),
		ConfigMaps: newCollection[corev1.ConfigMap]("v1", "ConfigMap", "configmaps"),
		Namespaces: newCollection[corev1.Namespace]("v1", "Namespace", "namespaces"),
		Webhooks: newCollection[admissionv1.MutatingWebhookConfiguration]("admissionregistration.k8s.io/v1",
			"MutatingWebhookConfiguration", "mutatingwebhookconfigurations")}
	s.prepare, s.Secrets.prepare, s.Secrets.check = preparePod, prepareSecret, s.checkSecret
	s.Secrets.serve(s.ServeMux, "/api/v1", true)
	s.ConfigMaps.serve(s.ServeMux, "/api/v1", true)
	s.Namespaces.serve(s.ServeMux, "/api/v1", false)
	s.Webhooks.serve(s.ServeMux, "/apis/admissionregistration.k8s.io/v1", false)
	const pods, pod = "/api/v1/namespaces/{namespace}/pods", "/api/v1/namespaces/{namespace}/pods/{name}"
	s.HandleFunc("GET /api/v1/pods", s.serveList)
	s.HandleFunc("GET "+pods, s.serveList)
	s.HandleFunc("POST "+pods, s.serveCreate)
	s.HandleFunc("GET "+pod, func(w http.ResponseWriter, r *http.Request) {
		p, status := s.Get(r.PathValue("namespace"), r.PathValue("name"))
		Respond(w, http.StatusOK, p, status)
	})
	s.HandleFunc("DELETE "+pod, func(w http.ResponseWriter, r *http.Request) {
		now := r.URL.Query().Get("gracePeriodSeconds") == "0"
		p, status := s.Delete(r.PathValue("namespace"), r.PathValue("name"), now)
		Respond(w, http.StatusOK, p, status)
	})
	s.HandleFunc("PATCH "+pod, s.servePatch)
	s.HandleFunc("PATCH "+pod+"/status", s.servePatch)
	const events = "/apis/events.k8s.io/v1/namespaces/{namespace}/events"
	s.HandleFunc("POST "+events, s.serveEvent)
	s.HandleFunc("GET "+events, func(w http.ResponseWriter, r *http.Request) {
		Respond(w, http.StatusOK, eventsv1.EventList{Items: s.EventsOf(r.PathValue("namespace"))}, nil)
	})
	return s
}

// preparePod completes a new pod.
func preparePod(p *corev1.Pod) {
	p.Status.Phase = cmp.Or(p.Status.Phase, corev1.PodPending)
	if len(p.Spec.SchedulingGates) > 0 && len(p.Status.Conditions) == 0 {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse,
			Reason:  corev1.PodReasonSchedulingGated,
			Message: "Scheduling is blocked due to non-empty scheduling gates"}}
	}
}

// Delete marks a pod as deleted, and removes it. If the pod has a node, it only marks the
// pod unless now is set: the kubelet removes it after its end.
func (s *APIStore) Delete(namespace, name string, now bool) (*corev1.Pod, *metav1.Status) {
	p, status := s.Change(namespace, name, func(p *corev1.Pod) {
		if p.DeletionTimestamp == nil {
			p.DeletionTimestamp = &metav1.Time{Time: time.Now().Truncate(time.Second)}
		}
	})
	if status != nil || p.Spec.NodeName != "" && !now {
		return p, status
	}
	return s.Collection.Delete(namespace, name)
}

// EventsOf returns the events of a namespace.
func (s *APIStore) EventsOf(namespace string) []eventsv1.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.events), func(e eventsv1.Event) bool { return e.Namespace != namespace })
}
