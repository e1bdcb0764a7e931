package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// truncate cuts s to the given number of bytes.
func truncate(s string, most int) string { return s[:min(len(s), most)] }

// quoteShort quotes a value that a user wrote, on one line and cut to 40 bytes.
func quoteShort(s string) string {
	const most = 40
	if len(s) > most {
		return strconv.Quote(s[:most]) + "..."
	}
	return strconv.Quote(s)
}

// ordinal writes 1 as "1st", 2 as "2nd", and so on.
func ordinal(n int) string {
	suffix := "th"
	if n/10%10 != 1 {
		switch n % 10 {
		case 1:
			suffix = "st"
		case 2:
			suffix = "nd"
		case 3:
			suffix = "rd"
		}
	}
	return fmt.Sprintf("%d%s", n, suffix)
}

// roughly writes a duration for people, in seconds, minutes or hours.
func roughly(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	}
	return fmt.Sprintf("%d h", d/time.Hour)
}

// clockTime writes a time for people: of today, or of another day.
func clockTime(t time.Time) string {
	layout := "15:04 MST"
	if t = t.UTC(); time.Until(t).Abs() > 20*time.Hour {
		layout = "2 Jan 15:04 MST"
	}
	return t.Format(layout)
}

// printable quotes a text from Redis unless a terminal can show it as it is. Any client
// with the password can write control characters there.
func printable(text string) string {
	if quoted := fmt.Sprintf("%+q", text); quoted != `"`+text+`"` {
		return quoted
	}
	return text
}

func seconds(d time.Duration) int { return int(d / time.Second) }

// maxObjectName is the longest name that Kubernetes accepts for a pod or a node.
const maxObjectName = 253

// objectName matches the characters of a pod's or a node's name. isObjectName checks the
// length: as part of the expression, it would cost each process 200 KB.
var objectName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]*$`)

// isObjectName reports whether a pod or a node can have this name. The API server calls
// webhooks before it validates the pod.
func isObjectName(name string) bool {
	return len(name) <= maxObjectName && objectName.MatchString(name)
}

// serverErrors joins the errors of several servers on one line.
type serverErrors []error

func (e serverErrors) Unwrap() []error { return e }

func (e serverErrors) Error() string {
	var texts []string
	for _, err := range e {
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

// unanswered returns the error of an attempt that ended for cause before the servers
// answered.
func unanswered(servers []string, cause error) error {
	var errs serverErrors
	for _, s := range servers {
		errs = append(errs, fmt.Errorf("%s: no answer yet: %w", s, cause))
	}
	return errs
}

func anySlice[T any](items []T) (all []any) {
	for _, i := range items {
		all = append(all, i)
	}
	return all
}

// mutatePath is where admission reviews are served. A slash and a secret follow it, if
// there is one.
const mutatePath = "/mutate"

// pathSecret matches a secret that Kubernetes accepts in a path. It has leastPathSecret
// to mostPathSecret characters.
var pathSecret = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*[a-z0-9]$`)

const (
	leastPathSecret = 16
	mostPathSecret  = 128
)

func isPathSecret(text string) bool {
	return len(text) >= leastPathSecret && len(text) <= mostPathSecret && pathSecret.MatchString(text)
}
