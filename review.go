package main

import (
	"encoding/json"
	"fmt"
	"net/http"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// admissionReview is what is needed of the API server's request. The pod is never decoded whole and marshalled
// again: fields that this program has not heard of must stay as they are.
type admissionReview struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Request    *admissionRequest `json:"request"`
}

type admissionRequest struct {
	UID         types.UID               `json:"uid"`
	Kind        metav1.GroupVersionKind `json:"kind"`
	SubResource string                  `json:"subResource"`
	Namespace   string                  `json:"namespace"`
	Operation   admissionv1.Operation   `json:"operation"`
	DryRun      bool                    `json:"dryRun"`
	Object      json.RawMessage         `json:"object"`

	pod *pod // what the object is if it is a pod, where it was scanned
}

type pod struct {
	Metadata struct {
		Name         string            `json:"name"`
		GenerateName string            `json:"generateName"`
		Annotations  map[string]string `json:"annotations"`
		Labels       map[string]string `json:"labels"`
	} `json:"metadata"`
	Spec struct {
		InitContainers   []podContainer              `json:"initContainers"`
		Containers       []podContainer              `json:"containers"`
		Volumes          []named                     `json:"volumes"`
		ImagePullSecrets []named                     `json:"imagePullSecrets"`
		RestartPolicy    string                      `json:"restartPolicy"`
		Resources        corev1.ResourceRequirements `json:"resources"`
		NodeSelector     map[string]string           `json:"nodeSelector"`
		OS               named                       `json:"os"`
		NodeName         string                      `json:"nodeName"`
		SchedulingGates  []named                     `json:"schedulingGates"`
		GracePeriod      *int64                      `json:"terminationGracePeriodSeconds"`
	} `json:"spec"`
}

// named is a part of a pod that has a name.
type named struct {
	Name string `json:"name"`
}

func (n named) name() string { return n.Name }

type podContainer struct {
	named
	Resources corev1.ResourceRequirements `json:"resources"`
}

func namesOf[T interface{ name() string }](items []T) []string {
	var names []string
	for _, i := range items {
		names = append(names, i.name())
	}
	return names
}

// name is the pod's name, or what the API server will make one of.
func (p *pod) name() string {
	if p.Metadata.Name == "" {
		return p.Metadata.GenerateName
	}
	return p.Metadata.Name
}

// isStatic reports whether the pod is the mirror of a static pod: the kubelet runs that from a file, whatever becomes of the mirror.
func (p *pod) isStatic() bool {
	_, ok := p.Metadata.Annotations[corev1.MirrorPodAnnotationKey]
	return ok
}

// isWindows reports whether the pod is to run on Windows.
func (p *pod) isWindows() bool {
	windows := string(corev1.Windows)
	return p.Spec.OS.Name == windows || p.Spec.NodeSelector[corev1.LabelOSStable] == windows
}

// badRequest is an error that is the sender's fault.
type badRequest struct {
	status int
	text   string
}

func (e *badRequest) Error() string { return e.text }

func bad(format string, args ...any) *badRequest {
	return &badRequest{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

// decodeReview reads an AdmissionReview; its errors are *badRequest.
func decodeReview(body []byte) (*admissionRequest, error) {
	if len(body) == 0 {
		return nil, bad("empty body: an AdmissionReview is expected")
	}
	review, ok := scanReview(body)
	if !ok {
		review = admissionReview{}
		if err := json.Unmarshal(body, &review); err != nil {
			return nil, bad("decode AdmissionReview: %v", err)
		}
	}
	if v := admissionv1.SchemeGroupVersion.String(); review.APIVersion != v || review.Kind != "AdmissionReview" {
		return nil, bad("got %s of %s: only AdmissionReview of %s is served", quoteShort(review.Kind), quoteShort(review.APIVersion), v)
	}
	switch r := review.Request; {
	case r == nil:
		return nil, bad("AdmissionReview without a request")
	case r.UID == "":
		return nil, bad("AdmissionReview without request.uid")
	default:
		return r, nil
	}
}

// decodePod reads the pod of a request to create one; its errors are *badRequest.
func decodePod(r *admissionRequest) (*pod, error) {
	if r.Namespace == "" {
		return nil, bad("AdmissionReview of a pod without request.namespace")
	}
	if len(r.Object) == 0 || string(r.Object) == "null" {
		return nil, bad("AdmissionReview of a pod without request.object")
	}
	if r.pod != nil {
		return r.pod, nil
	}
	p := new(pod)
	if err := json.Unmarshal(r.Object, p); err != nil {
		return nil, bad("decode request.object: %v", err)
	}
	return p, nil
}
