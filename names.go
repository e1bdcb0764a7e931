package main

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
)

// podName tells people which pod has a token, as "NAME NODE": NAME is the pod's, or what the API server will make one of, and NODE is
// empty where it has none yet. It is empty where nothing is known.
type podName string

// maxObjectName is how long the name of an object may be.
const maxObjectName = 253

// objectName is what names of pods and nodes are made of. How long they may be is for isObjectName: as part of the expression, it would take
// each process 200 KB to read it.
var objectName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]*$`)

// isObjectName reports whether a pod or a node can have this name. What a pod's creator writes has not been checked when the webhook is called.
func isObjectName(name string) bool {
	return len(name) <= maxObjectName && objectName.MatchString(name)
}

func newPodName(name, node string) podName {
	if !isObjectName(name) {
		return ""
	}
	if !isObjectName(node) {
		node = ""
	}
	return podName(name + " " + node)
}

// holder is who has a token.
type holder struct {
	name string // the pod's, or the token where that is not known
	held time.Duration
}

// heldUnknown is for how long a pod has a token that has not told.
const heldUnknown = -time.Second

// parseHolders reads what the acquire script says of them, and puts first who has a token longest.
func parseHolders(list []any) (holders []holder, err error) {
	for len(list) > 0 {
		var held int
		var h holder
		if list, err = redis.Scan(list, &held, &h.name); err != nil {
			return nil, err
		}
		h.held, h.name = time.Duration(held)*time.Second, shown(h.name)
		holders = append(holders, h)
	}
	slices.SortStableFunc(holders, func(a, b holder) int { return cmp.Compare(b.held, a.held) })
	return holders, nil
}

// shown is the name of a pod, or a token, as people may see it: whoever can write into Redis may have put anything there.
func shown(name string) string {
	if isObjectName(name) {
		return name
	}
	return printable(truncate(name, 40))
}

func (h holder) String() string {
	switch {
	case h.held == heldUnknown:
		return h.name
	case strings.HasSuffix(h.name, "-"): // the API server makes the name
		return fmt.Sprintf("%s... (%s)", h.name, roughly(h.held))
	}
	return fmt.Sprintf("%s (%s)", h.name, roughly(h.held))
}

// byHolders names those who have the tokens in use, as many as fit into the message of an event of Kubernetes, which is cut at 1024
// bytes.
func byHolders(holders []holder, inUse int) string {
	const most = 500
	var text string
	named := 0
	for _, h := range holders {
		if len(text)+len(h.String()) > most {
			break
		}
		if named > 0 {
			text += ", "
		}
		text += h.String()
		named++
	}
	switch {
	case named == 0:
		return ""
	case inUse > named:
		return fmt.Sprintf("by %s, and %d more", text, inUse-named)
	}
	return "by " + text
}
