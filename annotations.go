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

// truncate cuts what a user wrote to at most so many bytes.
func truncate(s string, most int) string { return s[:min(len(s), most)] }

// quoteShort quotes the beginning of a value that a user wrote, on one line.
func quoteShort(s string) string {
	const most = 40
	if len(s) > most {
		return strconv.Quote(s[:most]) + "..."
	}
	return strconv.Quote(s)
}
