package main

import (
	"fmt"
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
	annotationKey        = annotationPrefix + "key"                    // pods of a namespace with the same key share tokens
	annotationLength     = annotationPrefix + "length"                 // how many tokens there are
	annotationExpiration = annotationPrefix + "expiration"             // seconds that a maintenance lock may be held
	annotationWhenFull   = annotationPrefix + "when-full"              // deny, wait or gate; the webhook's --when-full if it is missing
	annotationToken      = annotationPrefix + "token"                  // set by the patch: the pod's token, if it was taken by the webhook
)

// What the annotations may say. The bounds keep a pod from making the webhook allocate or loop by a number.
const (
	maxKey        = 253
	maxLength     = 10000
	maxExpiration = 3600
)

var keyPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$`)

// semaphoreSpec is what a pod's annotations say of its semaphore.
type semaphoreSpec struct {
	key        string
	length     int
	expiration time.Duration
	whenFull   string // what becomes of it if no token is free: one of whenFullChoices
}

// parseAnnotations reads the annotations of an annotated pod; problems are all that is wrong with them. whenFull is for pods that
// do not say what becomes of them.
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

// whenFullOf is what the annotations say, or else the webhook.
func whenFullOf(annotations map[string]string, whenFull string) string {
	if own, ok := annotations[annotationWhenFull]; ok {
		return own
	}
	return whenFull
}

// checkKey says what a key must be if this one is not.
func checkKey(key string) string {
	if len(key) > maxKey {
		return fmt.Sprintf("it has %d characters: at most %d are allowed", len(key), maxKey)
	}
	if !keyPattern.MatchString(key) {
		return "it must be letters, digits and . _ / -, and begin and end with a letter or digit"
	}
	return ""
}

// parseDigits reads a number of digits only: no sign, no spaces.
func parseDigits(s string) (int, bool) {
	if strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.Atoi(s)
	return n, err == nil
}

// What a gated pod has from the webhook.
const (
	gateName   = annotationPrefix + "token" // the scheduling gate
	labelGated = annotationPrefix + "gated" // "true", and the Unix time at which the gate was lifted; until the sidecar has taken over
)

// The names of the injected containers.
const (
	sidecarName = "at-least-semaphore-pod-sidecar"
	awaitName   = "at-least-semaphore-pod-await"
)

// What becomes of a pod for which no token is free.
const (
	whenFullDeny = "deny" // it is refused
	whenFullWait = "wait" // it is admitted, and its sidecar waits for a token before any other container starts
	whenFullGate = "gate" // it is admitted, and not scheduled before it has a token: see gate.go
)

// whenFullChoices are what --when-full and the annotation when-full may say.
var whenFullChoices = []string{whenFullDeny, whenFullWait, whenFullGate}

// named is a part of a pod that has a name.
type named struct {
	Name string `json:"name"`
}

func (n named) name() string { return n.Name }
