package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

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

// roughly is a duration for people.
func roughly(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	}
	return fmt.Sprintf("%d h", d/time.Hour)
}

// printable is a text from Redis, where anybody with its password may have put anything, as it can be shown on a terminal.
func printable(text string) string {
	if quoted := fmt.Sprintf("%+q", text); quoted != `"`+text+`"` {
		return quoted
	}
	return text
}

func seconds(d time.Duration) int { return int(d / time.Second) }

// maxObjectName is how long the name of an object may be.
const maxObjectName = 253

// objectName is what names of pods and nodes are made of. How long they may be is for isObjectName: as part of the expression, it would take
// each process 200 KB to read it.
var objectName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]*$`)

// isObjectName reports whether a pod or a node can have this name. What a pod's creator writes has not been checked when the webhook is called.
func isObjectName(name string) bool {
	return len(name) <= maxObjectName && objectName.MatchString(name)
}

// serverErrors are the errors of several servers, on one line.
type serverErrors []error

func (e serverErrors) Unwrap() []error { return e }

func (e serverErrors) Error() string {
	var texts []string
	for _, err := range e {
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

// unanswered is the error of an attempt that was given up before the servers had answered.
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
