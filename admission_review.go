package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// admissionReview is the part of the API server's request that we need. The pod is never
// decoded whole and marshalled again: fields that this program does not know must stay as
// they are.
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

	pod *pod // the object, if the scanner has read it as a pod
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
		HostNetwork      bool                        `json:"hostNetwork"`
		DNSPolicy        corev1.DNSPolicy            `json:"dnsPolicy"`
	} `json:"spec"`
}

// workload is an object with a pod template.
type workload struct {
	metadata
	Spec struct {
		Replicas *int32 `json:"replicas"`
		Strategy struct {
			RollingUpdate *struct { // the API server sets its values
				MaxUnavailable intstr.IntOrString `json:"maxUnavailable"`
				MaxSurge       intstr.IntOrString `json:"maxSurge"`
			} `json:"rollingUpdate"`
		} `json:"strategy"` // of a Deployment
		Deadline    int64 `json:"activeDeadlineSeconds"` // of a Job; 0: none
		Template    pod   `json:"template"`
		JobTemplate struct {
			metadata
			Spec struct {
				Deadline int64 `json:"activeDeadlineSeconds"`
				Template pod   `json:"template"`
			} `json:"spec"`
		} `json:"jobTemplate"` // of a CronJob
	} `json:"spec"`
}

type metadata struct {
	Metadata struct {
		Annotations map[string]string `json:"annotations"`
	} `json:"metadata"`
}

// templateOf returns where an object that is created or updated has its pod template, or
// "" if it has none.
func templateOf(r *admissionRequest) string {
	if r.SubResource != "" || r.Operation != admissionv1.Create && r.Operation != admissionv1.Update {
		return ""
	}
	switch r.Kind.Group + "/" + r.Kind.Kind {
	case "apps/Deployment", "apps/StatefulSet", "apps/DaemonSet", "apps/ReplicaSet", "/ReplicationController",
		"batch/Job":
		return "spec.template"
	case "batch/CronJob":
		return "spec.jobTemplate.spec.template"
	}
	return ""
}

// pod returns the template. At most one of the two is there.
func (w *workload) pod() *pod {
	if t := &w.Spec.JobTemplate.Spec.Template; t.Metadata.Annotations != nil {
		return t
	}
	return &w.Spec.Template
}

// deadline returns the seconds after which a Job fails, with those in line; 0: there is none.
func (w *workload) deadline() int64 { return max(w.Spec.Deadline, w.Spec.JobTemplate.Spec.Deadline) }

// canRoll reports whether an update of a Deployment ends, if no other pods use the
// tokens. The controller ends an old pod only while fewer pods than unavailable, its
// maxUnavailable, are not ready; enough is the least value with which it gets on.
func (w *workload) canRoll(length int) (unavailable, enough int, ok bool) {
	rolling := w.Spec.Strategy.RollingUpdate
	if rolling == nil || w.Spec.Replicas == nil {
		return 0, 0, true
	}
	replicas := int(*w.Spec.Replicas)
	unavailable, err := intstr.GetScaledValueFromIntOrPercent(&rolling.MaxUnavailable, replicas, false)
	surge, wrong := intstr.GetScaledValueFromIntOrPercent(&rolling.MaxSurge, replicas, true)
	enough = replicas - min(length, replicas) + 1
	free := length > replicas && surge > 0 // for a new pod
	return unavailable, enough, err != nil || wrong != nil || replicas == 0 || free || unavailable >= enough
}

// misplaces reports whether an annotation under our prefix stands on the object and not
// on its template.
func (w *workload) misplaces(template map[string]string) bool {
	for _, m := range []metadata{w.metadata, w.Spec.JobTemplate.metadata} {
		for name := range m.Metadata.Annotations {
			if _, ok := template[name]; !ok && strings.HasPrefix(name, annotationPrefix) {
				return true
			}
		}
	}
	return false
}

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

// name is the pod's name, or the generateName from which the API server makes one.
func (p *pod) name() string {
	if p.Metadata.Name == "" {
		return p.Metadata.GenerateName
	}
	return p.Metadata.Name
}

// isStatic reports whether the pod is the mirror of a static pod. The kubelet runs a
// static pod from a file, whatever becomes of the mirror.
func (p *pod) isStatic() bool {
	_, ok := p.Metadata.Annotations[corev1.MirrorPodAnnotationKey]
	return ok
}

// isWindows reports whether the pod runs on Windows.
func (p *pod) isWindows() bool {
	windows := string(corev1.Windows)
	return p.Spec.OS.Name == windows || p.Spec.NodeSelector[corev1.LabelOSStable] == windows
}

// asksNodeForNames reports whether a pod in the host's network asks the DNS of its node,
// which does not know the names of the cluster.
func (p *pod) asksNodeForNames() bool {
	return p.Spec.HostNetwork && p.Spec.DNSPolicy != corev1.DNSClusterFirstWithHostNet && p.Spec.DNSPolicy != corev1.DNSNone
}

// badRequest is an error in the request.
type badRequest struct {
	status int
	text   string
}

func (e *badRequest) Error() string { return e.text }

func badRequestf(format string, args ...any) *badRequest {
	return &badRequest{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

// decodeReview reads an AdmissionReview; its errors are *badRequest.
func decodeReview(body []byte) (*admissionRequest, error) {
	if len(body) == 0 {
		return nil, badRequestf("empty body: an AdmissionReview is expected")
	}
	review, ok := scanReview(body)
	if !ok {
		review = admissionReview{}
		if err := json.Unmarshal(body, &review); err != nil {
			return nil, badRequestf("decode AdmissionReview: %v", err)
		}
	}
	if v := admissionv1.SchemeGroupVersion.String(); review.APIVersion != v || review.Kind != "AdmissionReview" {
		return nil, badRequestf("got %s of %s: only AdmissionReview of %s is served",
			quoteShort(review.Kind), quoteShort(review.APIVersion), v)
	}
	switch r := review.Request; {
	case r == nil:
		return nil, badRequestf("AdmissionReview without a request")
	case r.UID == "":
		return nil, badRequestf("AdmissionReview without request.uid")
	default:
		return r, nil
	}
}

// decodePod reads the pod of a request to create one; its errors are *badRequest.
func decodePod(r *admissionRequest) (*pod, error) {
	if r.Namespace == "" {
		return nil, badRequestf("AdmissionReview of a pod without request.namespace")
	}
	if len(r.Object) == 0 || string(r.Object) == "null" {
		return nil, badRequestf("AdmissionReview of a pod without request.object")
	}
	if r.pod != nil {
		return r.pod, nil
	}
	p := new(pod)
	if err := json.Unmarshal(r.Object, p); err != nil {
		return nil, badRequestf("decode request.object: %v", err)
	}
	return p, nil
}

// scanner reads a JSON document in one pass and keeps only the fields that are asked for.
// encoding/json needs four passes, which were a quarter of the cost of an admission. The
// scanner knows documents as an API server writes them. On all others it fails, without a
// reason, and encoding/json decides. Examples are invalid JSON, null or a wrong type in a
// field that we need, field names in another case, and deep nesting.
type scanner struct {
	text   []byte
	at     int
	depth  int
	failed bool
}

// maxDepth is how deep values may be nested. A pod's affinity needs about twenty levels,
// and so do the managedFields of any object.
const maxDepth = 64

func (s *scanner) fail() {
	s.failed = true
	s.at = len(s.text)
}

// next returns the first byte of the next token, or 0 at the end.
func (s *scanner) next() byte {
	for ; s.at < len(s.text); s.at++ {
		switch c := s.text[s.at]; c {
		case ' ', '\t', '\n', '\r':
		default:
			return c
		}
	}
	return 0
}

// take consumes a byte that must come next.
func (s *scanner) take(c byte) {
	if s.next() != c || s.failed {
		s.fail()
		return
	}
	s.at++
}

// list reads the items between two brackets.
func (s *scanner) list(open, end byte, item func()) {
	s.take(open)
	if s.depth++; s.depth > maxDepth {
		s.fail()
	}
	if s.next() != end {
		item()
		for s.next() == ',' {
			s.at++
			item()
		}
	}
	s.take(end)
	s.depth--
}

func (s *scanner) items(item func()) { s.list('[', ']', item) }

// fields reads an object. visit must read the value of each known field; other fields are
// skipped.
func (s *scanner) fields(known []string, visit func(name string)) {
	s.list('{', '}', func() {
		name, plain := s.quoted()
		s.take(':')
		for _, k := range known {
			switch {
			case string(name) == k:
				visit(k)
				return
			case !plain, len(name) == len(k) && strings.EqualFold(string(name), k): // encoding/json may know it
				s.fail()
			}
		}
		s.skip()
	})
}

// skip reads any value.
func (s *scanner) skip() {
	switch c := s.next(); {
	case c == '{':
		s.fields(nil, nil)
	case c == '[':
		s.items(s.skip)
	case c == '"':
		s.quoted()
	case c == '-' || isDigit(c):
		s.number()
	default:
		s.word()
	}
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// value returns the text of any value.
func (s *scanner) value() []byte {
	s.next()
	start := s.at
	s.skip()
	return s.text[start:s.at]
}

// word reads true, false or null.
func (s *scanner) word() string {
	for _, word := range []string{"true", "false", "null"} {
		if bytes.HasPrefix(s.text[s.at:], []byte(word)) {
			s.at += len(word)
			return word
		}
	}
	s.fail()
	return ""
}

// bool reads true or false.
func (s *scanner) bool() bool {
	s.next()
	word := s.word()
	if word == "null" {
		s.fail()
	}
	return word == "true"
}

// number reads a number.
func (s *scanner) number() {
	digits := func() {
		if s.at == len(s.text) || !isDigit(s.text[s.at]) {
			s.fail()
		}
		for s.at < len(s.text) && isDigit(s.text[s.at]) {
			s.at++
		}
	}
	has := func(any string) bool {
		found := s.at < len(s.text) && bytes.IndexByte([]byte(any), s.text[s.at]) >= 0
		if found {
			s.at++
		}
		return found
	}
	has("-")
	if !has("0") {
		digits()
	}
	if has(".") {
		digits()
	}
	if has("eE") {
		has("+-")
		digits()
	}
}

// quoted reads a string. A plain string is ASCII without escapes: its text is its value.
func (s *scanner) quoted() (text []byte, plain bool) {
	s.take('"')
	start := s.at
	plain = true
	for at := start; at < len(s.text); {
		switch c := s.text[at]; {
		case c == '"':
			s.at = at + 1
			return s.text[start:at], plain
		case c == '\\':
			plain = false
			s.at = at
			s.escape()
			at = s.at
		case c < ' ':
			at = len(s.text)
		default:
			plain = plain && c < 0x80
			at++
		}
	}
	s.fail()
	return nil, false
}

// escape reads an escape sequence.
func (s *scanner) escape() {
	rest := s.text[s.at+1:]
	switch {
	case len(rest) > 0 && bytes.IndexByte([]byte(`"\/bfnrt`), rest[0]) >= 0:
		s.at += 2
	case len(rest) > 4 && rest[0] == 'u' && len(bytes.Trim(rest[1:5], "0123456789abcdefABCDEF")) == 0:
		s.at += 6
	default:
		s.fail()
	}
}

// string reads a string.
func (s *scanner) string() (text string) {
	s.next()
	start := s.at
	inner, plain := s.quoted()
	if plain {
		return string(inner)
	}
	s.unmarshal(s.text[start:s.at], &text)
	return text
}

// unmarshal leaves a value to encoding/json.
func (s *scanner) unmarshal(value []byte, to any) {
	if s.failed || json.Unmarshal(value, to) != nil {
		s.fail()
	}
}

// strings reads an object whose values are strings.
func (s *scanner) strings(to *map[string]string) {
	if *to == nil {
		*to = map[string]string{}
	}
	s.list('{', '}', func() {
		name := s.string()
		s.take(':')
		(*to)[name] = s.string()
	})
}

// The fields that are read; see the types above.
var (
	reviewFields   = []string{"kind", "apiVersion", "request"}
	requestFields  = []string{"uid", "kind", "subResource", "namespace", "operation", "object", "dryRun"}
	kindFields     = []string{"group", "version", "kind"}
	objectFields   = []string{"metadata", "spec"}
	metadataFields = []string{"name", "generateName", "annotations", "labels"}
	specFields     = []string{"volumes", "initContainers", "containers", "restartPolicy",
		"terminationGracePeriodSeconds", "nodeSelector", "imagePullSecrets", "os", "resources", "nodeName",
		"schedulingGates", "hostNetwork", "dnsPolicy"}
	containerFields = []string{"name", "resources"}
	namedFields     = []string{"name"}
)

// scanReview reads a review, and its object as a pod. ok is false if encoding/json has to
// decide.
func scanReview(body []byte) (review admissionReview, ok bool) {
	s := &scanner{text: body}
	s.fields(reviewFields, func(name string) {
		switch name {
		case "kind":
			review.Kind = s.string()
		case "apiVersion":
			review.APIVersion = s.string()
		case "request":
			if review.Request != nil { // encoding/json merges the two
				s.fail()
			}
			review.Request = s.request()
		}
	})
	return review, s.next() == 0 && s.at == len(body) && !s.failed
}

func (s *scanner) request() *admissionRequest {
	r := new(admissionRequest)
	s.fields(requestFields, func(name string) {
		switch name {
		case "uid":
			r.UID = types.UID(s.string())
		case "kind":
			s.fields(kindFields, func(name string) {
				switch name {
				case "group":
					r.Kind.Group = s.string()
				case "version":
					r.Kind.Version = s.string()
				case "kind":
					r.Kind.Kind = s.string()
				}
			})
		case "subResource":
			r.SubResource = s.string()
		case "namespace":
			r.Namespace = s.string()
		case "operation":
			r.Operation = admissionv1.Operation(s.string())
		case "object":
			s.next()
			start := s.at
			r.pod = s.pod()
			r.Object = s.text[start:s.at]
		case "dryRun":
			r.DryRun = s.bool()
		}
	})
	return r
}

func (s *scanner) pod() *pod {
	p := new(pod)
	s.fields(objectFields, func(name string) {
		switch name {
		case "metadata":
			s.fields(metadataFields, func(name string) {
				switch name {
				case "name":
					p.Metadata.Name = s.string()
				case "generateName":
					p.Metadata.GenerateName = s.string()
				case "annotations":
					s.strings(&p.Metadata.Annotations)
				case "labels":
					s.strings(&p.Metadata.Labels)
				}
			})
		case "spec":
			s.fields(specFields, func(name string) { s.spec(p, name) })
		}
	})
	return p
}

// spec reads a field of a pod's spec.
func (s *scanner) spec(p *pod, name string) {
	switch name {
	case "volumes":
		scanItems(s, &p.Spec.Volumes, s.named)
	case "initContainers":
		scanItems(s, &p.Spec.InitContainers, s.container)
	case "containers":
		scanItems(s, &p.Spec.Containers, s.container)
	case "restartPolicy":
		p.Spec.RestartPolicy = s.string()
	case "terminationGracePeriodSeconds":
		n, err := strconv.ParseInt(string(s.value()), 10, 64)
		if err != nil {
			s.fail()
		}
		p.Spec.GracePeriod = &n
	case "nodeSelector":
		s.strings(&p.Spec.NodeSelector)
	case "imagePullSecrets":
		scanItems(s, &p.Spec.ImagePullSecrets, s.named)
	case "schedulingGates":
		scanItems(s, &p.Spec.SchedulingGates, s.named)
	case "nodeName":
		p.Spec.NodeName = s.string()
	case "hostNetwork":
		p.Spec.HostNetwork = s.bool()
	case "dnsPolicy":
		p.Spec.DNSPolicy = corev1.DNSPolicy(s.string())
	case "os":
		p.Spec.OS = s.named()
	case "resources":
		s.unmarshal(s.value(), &p.Spec.Resources)
	}
}

// scanItems reads a list. A second one of the same name fails: encoding/json would write
// it over the first, field by field.
func scanItems[T any](s *scanner, to *[]T, item func() T) {
	if *to != nil {
		s.fail()
	}
	*to = []T{}
	s.items(func() { *to = append(*to, item()) })
}

func (s *scanner) named() (n named) {
	s.fields(namedFields, func(string) { n.Name = s.string() })
	return n
}

func (s *scanner) container() (c podContainer) {
	s.fields(containerFields, func(name string) {
		switch name {
		case "name":
			c.Name = s.string()
		case "resources":
			s.unmarshal(s.value(), &c.Resources)
		}
	})
	return c
}
