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
	annotationTokens     = annotationPrefix + "tokens"                 // that the pod needs, all or none; else 1
	annotationHeadStart  = annotationPrefix + "head-start"             // seconds that its place is before its arrival
	annotationWait       = annotationPrefix + "wait-seconds"           // how long it waits in line; else for ever
	annotationWhenWaited = annotationPrefix + "when-waited"            // fail or run
	annotationToken      = annotationPrefix + "token"                  // set by the patch: the token that the webhook took
)

// annotationNames are all of them.
var annotationNames = []string{annotationEnabled, annotationKey, annotationLength, annotationExpiration,
	annotationWhenFull, annotationTokens, annotationHeadStart, annotationWait, annotationWhenWaited, annotationToken}

// Bounds of the annotations. Without them, one large number in a pod could make the
// webhook allocate or loop for long.
const (
	maxKey        = 253
	maxLength     = 10000
	maxTokens     = 100 // as in semaphore.lua
	maxExpiration = 3600
	mostHeadStart = 604800
	mostOvertake  = 604800 // seconds
	maxWait       = 604800 // seconds: a week
)

var keyPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$`)

// semaphoreSpec is the semaphore that a pod's annotations describe.
type semaphoreSpec struct {
	key        string
	length     int // the one that is set, unless that is 0; or else the pod's
	isSet      bool
	set        int // by the owner, if isSet
	asked      int // by the pod; 0: nothing
	expiration time.Duration
	tokens     int    // that the pod needs
	whenFull   string // one of whenFullChoices
	headStart  time.Duration
	wishes     time.Duration // the head start that the pod asks for
	wait       waitEnd
	stays      bool // it asks to run beyond the length, which the owner does not allow: it waits on
}

// waitEnd is when a pod stops waiting in line. Zero: when it has a token.
type waitEnd struct {
	after time.Duration
	then  string // one of whenWaitedChoices
}

// runs reports whether the pod takes a token beyond the length then.
func (e waitEnd) runs() bool { return e.after > 0 && e.then == whenWaitedRun }

// fails reports whether the pod fails then.
func (e waitEnd) fails() bool { return e.after > 0 && !e.runs() }

// parseAnnotations reads the annotations of a pod in a namespace, and returns all their
// problems. whenFull applies to pods without the annotation when-full; maxHeadStart bounds
// head starts.
func parseAnnotations(namespace string, annotations map[string]string, whenFull string,
	maxHeadStart time.Duration, owners ownerSettings) (spec semaphoreSpec, problems []string) {
	problem := func(name, format string, args ...any) {
		problems = append(problems, name+" "+fmt.Sprintf(format, args...))
	}
	number := func(name string, least, most int, or string) int {
		text, ok := annotations[name]
		n, isNumber := parseDigits(text)
		switch {
		case !ok:
			problem(name, "is missing: it must be a whole number from %d to %d%s", least, most, or)
		case !isNumber || n < least || n > most:
			problem(name, "is %s: it must be a whole number from %d to %d", quoteShort(text), least, most)
		}
		return n
	}
	spec = semaphoreSpec{key: annotations[annotationKey]}
	key, isShared := strings.CutPrefix(spec.key, shared)
	wrong := checkKey(key)
	var line ownerLine
	switch _, ok := annotations[annotationKey]; {
	case !ok:
		problem(annotationKey, "is missing")
	case wrong != "":
		problem(annotationKey, "is %s: %s", quoteShort(spec.key), wrong)
	case isShared:
		if err := owners.mayShare(namespace, key); err != nil {
			problem(annotationKey, "is %s: %v", quoteShort(spec.key), err)
		}
		line, spec.isSet = owners.lineOf(shared, key)
	default:
		line, spec.isSet = owners.lineOf(namespace, key)
	}
	spec.set = line.length
	if _, ok := annotations[annotationLength]; ok || !spec.isSet {
		spec.asked = number(annotationLength, 1, maxLength, ", unless the ConfigMap semaphores sets a length for this key")
	}
	if spec.length = spec.asked; spec.set > 0 {
		spec.length = spec.set
	} else if spec.isSet {
		spec.length = max(1, spec.asked) // paused
	}
	spec.expiration = time.Duration(number(annotationExpiration, 1, maxExpiration, "")) * time.Second
	spec.whenFull = whenFullOf(annotations, whenFull)
	if text, ok := annotations[annotationWhenFull]; ok && !slices.Contains(whenFullChoices, text) {
		problem(annotationWhenFull, "is %s: it must be deny, wait or gate", quoteShort(text))
	}
	spec.tokens = 1
	if text, ok := annotations[annotationTokens]; ok {
		switch spec.tokens = number(annotationTokens, 1, maxTokens, ""); {
		case spec.tokens > 1 && spec.whenFull == whenFullDeny:
			problem(annotationTokens, "is %s: with when-full deny, a pod that needs several tokens would hardly ever "+
				"find them free at one time; choose wait or gate", quoteShort(text))
		case spec.tokens > spec.length && spec.length > 0 && (spec.set > 0 || spec.asked > 0):
			problem(annotationTokens, "is %s, and the length is %d: the pod could never run", quoteShort(text), spec.length)
		}
	}
	if text, ok := annotations[annotationHeadStart]; ok {
		spec.wishes = time.Duration(number(annotationHeadStart, 0, seconds(maxHeadStart), "")) * time.Second
		if spec.wishes > 0 && spec.whenFull == whenFullDeny {
			problem(annotationHeadStart, "is %s: with when-full deny, a pod stands in no line; choose wait or gate",
				quoteShort(text))
		}
		if spec.headStart = spec.wishes; line.capped {
			spec.headStart = min(spec.headStart, line.headStart)
		}
	}
	then, hasThen := annotations[annotationWhenWaited]
	_, ends := annotations[annotationWait]
	if ends {
		spec.wait = waitEnd{time.Duration(number(annotationWait, 1, maxWait, "")) * time.Second, whenWaitedFail}
	}
	switch {
	case ends && spec.whenFull == whenFullDeny:
		problem(annotationWait, "is for pods that wait: with when-full %q, none does", spec.whenFull)
	case hasThen && !ends:
		problem(annotationWhenWaited, "is not used without wait-seconds: the pod waits until it has a token")
	case hasThen && !slices.Contains(whenWaitedChoices, then):
		problem(annotationWhenWaited, "is %s: it must be fail or run", quoteShort(then))
	case hasThen:
		spec.wait.then = then
	}
	if spec.wait.runs() && spec.isSet && !line.runs {
		spec.wait, spec.stays = waitEnd{}, true
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

	conditionGaveUp = annotationPrefix + "GaveUp" // of a gated pod that gave up

	conditionScheduled = "PodScheduled"

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

// exitGaveUp is the exit code of an await whose pod gave up waiting, for a podFailurePolicy:
// EX_TEMPFAIL of sysexits.h.
const exitGaveUp = 75

// The choices for a pod that finds no free token.
const (
	whenFullDeny = "deny" // the webhook refuses the pod
	whenFullWait = "wait" // the sidecar waits for a token before any other container starts
	whenFullGate = "gate" // the pod stays unscheduled until it has a token: see gate.go
)

// whenFullChoices are the values of --when-full and of the annotation when-full.
var whenFullChoices = []string{whenFullDeny, whenFullWait, whenFullGate}

// The choices for a pod whose time in line is over.
const (
	whenWaitedFail = "fail" // it leaves the line, and fails
	whenWaitedRun  = "run"  // it takes a token beyond the length
)

// whenWaitedChoices are the values of the annotation when-waited.
var whenWaitedChoices = []string{whenWaitedFail, whenWaitedRun}

// named is a part of a pod of which only the name matters.
type named struct {
	Name string `json:"name"`
}

func (n named) name() string { return n.Name }
