package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The annotations of a pod.
const (
	annotationPrefix     = "at-least-semaphore-pod-hook.kaidotio.github.io/"
	annotationEnabled    = annotationPrefix + "at-least-semaphore-pod" // "true": this pod needs a token
	annotationKey        = annotationPrefix + "key"                    // pods with the same key share tokens
	annotationLength     = annotationPrefix + "length"                 // number of tokens
	annotationExpiration = annotationPrefix + "expiration"             // seconds after which a repair's lock expires
	annotationWhenFull   = annotationPrefix + "when-full"              // deny, wait or gate; else --when-full
	annotationToken      = annotationPrefix + "token"                  // set by the patch: the token that the webhook took
)

// annotationNames are all of them.
var annotationNames = []string{annotationEnabled, annotationKey, annotationLength, annotationExpiration,
	annotationWhenFull, annotationToken}

// Bounds of the annotations. Without them, one large number in a pod could make the
// webhook allocate or loop for long.
const (
	maxKey        = 253
	maxLength     = 10000
	maxExpiration = 3600
)

var keyPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$`)

// semaphoreSpec is the semaphore that a pod's annotations describe.
type semaphoreSpec struct {
	key        string
	length     int
	expiration time.Duration
	whenFull   string // one of whenFullChoices
}

// parseAnnotations reads a pod's annotations and returns all their problems. whenFull
// applies to pods without the annotation when-full.
func parseAnnotations(annotations map[string]string, whenFull string) (spec semaphoreSpec, problems []string) {
	problem := func(name, format string, args ...any) {
		problems = append(problems, name+" "+fmt.Sprintf(format, args...))
	}
	number := func(name string, most int) int {
		text, ok := annotations[name]
		n, isNumber := parseDigits(text)
		switch {
		case !ok:
			problem(name, "is missing: it must be a whole number from 1 to %d", most)
		case !isNumber || n < 1 || n > most:
			problem(name, "is %s: it must be a whole number from 1 to %d", quoteShort(text), most)
		}
		return n
	}
	if key, ok := annotations[annotationKey]; !ok {
		problem(annotationKey, "is missing")
	} else if wrong := checkKey(key); wrong != "" {
		problem(annotationKey, "is %s: %s", quoteShort(key), wrong)
	}
	spec = semaphoreSpec{
		key:        annotations[annotationKey],
		length:     number(annotationLength, maxLength),
		expiration: time.Duration(number(annotationExpiration, maxExpiration)) * time.Second,
		whenFull:   whenFullOf(annotations, whenFull),
	}
	if text, ok := annotations[annotationWhenFull]; ok && !slices.Contains(whenFullChoices, text) {
		problem(annotationWhenFull, "is %s: it must be deny, wait or gate", quoteShort(text))
	}
	return spec, problems
}

// whenFullOf returns the pod's own annotation when-full, or else whenFull of the webhook.
func whenFullOf(annotations map[string]string, whenFull string) string {
	if own, ok := annotations[annotationWhenFull]; ok {
		return own
	}
	return whenFull
}

// Bounds of the warnings about unknown annotations: of their number, and of a name, which
// Kubernetes checks only later.
const (
	mostUnknown = 5
	mostName    = 63
)

// doubtfulAnnotations returns what a user probably did not mean: annotations under our
// prefix that are unknown, or that do not count because a pod is not enabled.
func doubtfulAnnotations(annotations map[string]string) (doubts []string) {
	ours := false
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		own, found := strings.CutPrefix(name, annotationPrefix)
		ours = ours || found
		if !found || slices.Contains(annotationNames, name) || len(doubts) == mostUnknown {
			continue
		}
		doubt := truncate(name, len(annotationPrefix)+mostName) + " is unknown"
		for _, known := range annotationNames {
			if known = known[len(annotationPrefix):]; isTypo(strings.ToLower(own), known) {
				doubt += ": did you mean " + known + "?"
			}
		}
		doubts = append(doubts, doubt)
	}
	switch enabled, ok := annotations[annotationEnabled]; {
	case !ours, enabled == "true", enabled == "false":
	case ok:
		doubts = append(doubts, fmt.Sprintf(`%s is %s: the pod runs uncounted; write "true"`,
			annotationEnabled, quoteShort(enabled)))
	default:
		doubts = append(doubts, annotationEnabled+` is missing: the pod runs uncounted; add it as "true"`)
	}
	return doubts
}

// isTypo reports whether two names differ in one letter: it is missing, surplus, wrong, or
// has changed places with the next.
func isTypo(a, b string) bool {
	for a != "" && b != "" && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for a != "" && b != "" && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return len(a) <= 1 && len(b) <= 1 || len(a) == 2 && len(b) == 2 && a[0] == b[1] && a[1] == b[0]
}

// checkKey returns what is wrong with a key, or "" if it is valid.
func checkKey(key string) string {
	if len(key) > maxKey {
		return fmt.Sprintf("it has %d characters: at most %d are allowed", len(key), maxKey)
	}
	if !keyPattern.MatchString(key) {
		return "it must be letters, digits and . _ / -, and begin and end with a letter or digit"
	}
	return ""
}

// parseDigits reads a number that consists of digits only: no sign, no spaces.
func parseDigits(s string) (int, bool) {
	if strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.Atoi(s)
	return n, err == nil
}

// The webhook adds these to a gated pod.
const (
	gateName = annotationPrefix + "token" // the scheduling gate

	// labelGated is "true" at first, and the Unix time of the lift once the gate is
	// lifted. It goes when the sidecar takes over.
	labelGated = annotationPrefix + "gated"

	// labelSidecars opens a namespace to sidecars, with the value "true".
	labelSidecars = annotationPrefix + "sidecars"
)

// The names of the injected containers.
const (
	sidecarName = "at-least-semaphore-pod-sidecar"
	awaitName   = "at-least-semaphore-pod-await"
)

// The choices for a pod that finds no free token.
const (
	whenFullDeny = "deny" // the webhook refuses the pod
	whenFullWait = "wait" // the sidecar waits for a token before any other container starts
	whenFullGate = "gate" // the pod stays unscheduled until it has a token: see gate.go
)

// whenFullChoices are the values of --when-full and of the annotation when-full.
var whenFullChoices = []string{whenFullDeny, whenFullWait, whenFullGate}

// named is a part of a pod of which only the name matters.
type named struct {
	Name string `json:"name"`
}

func (n named) name() string { return n.Name }
