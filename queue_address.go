package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// queueKind is how the queue's Redis outlives a failure.
type queueKind int

const (
	queueServerAlone queueKind = iota // one server, or an address behind which a provider puts the primary
	queueSentinel                     // the primary that Sentinels name
	queueCluster                      // a Redis Cluster
)

// queueAddress is where the queue's Redis is found.
type queueAddress struct {
	kind    queueKind
	servers []string // HOST:PORT with the scheme of one server: the server, the Sentinels, or some nodes of the Cluster
	name    string   // of the primary, for the Sentinels
	text    string   // as in the flag
}

func (a queueAddress) String() string { return a.text }

// scheme is that of the servers: "", "redis://" or "rediss://".
func (a queueAddress) scheme() string {
	scheme, _, found := strings.Cut(a.servers[0], "://")
	if !found {
		return ""
	}
	return scheme + "://"
}

// Examples of right addresses, for messages.
const (
	sentinelExample = "redis+sentinel://a:26379,b:26379,c:26379/NAME"
	clusterExample  = "redis+cluster://a:6379,b:6379,c:6379"
)

// primaryName is a name that Sentinels accept.
var primaryName = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// readQueueAddress reads an address of any kind.
func readQueueAddress(text string) (queueAddress, error) {
	scheme, rest, _ := strings.Cut(text, "://")
	plain, engine, isGroup := strings.Cut(scheme, "+")
	a := queueAddress{text: text}
	if !isGroup || strings.Contains(text, "@") || strings.Contains(text, "%40") {
		server, err := readAddress("redis://", "rediss://")(text)
		a.servers, a.text = []string{server}, server
		if err != nil && !strings.Contains(err.Error(), "credentials") {
			err = fmt.Errorf("%w (for a group of servers: %s or %s)", err, sentinelExample, clusterExample)
		}
		return a, err
	}
	example := clusterExample
	var problems []error
	switch {
	case plain != "redis" && plain != "rediss":
		return a, fmt.Errorf("%q is no scheme: an address is HOST:PORT, or like %s or %s", scheme+"://", sentinelExample, clusterExample)
	case engine == "sentinel":
		a.kind, example = queueSentinel, sentinelExample
		var found bool
		rest, a.name, found = strings.Cut(rest, "/")
		switch {
		case !found || a.name == "":
			problems = append(problems, errors.New("the name of the primary is missing"))
		case !primaryName.MatchString(a.name):
			problems = append(problems, fmt.Errorf("%s is no name of a primary: it has letters, digits, and the characters ._- only", quoteShort(a.name)))
		}
	case engine == "cluster":
		a.kind = queueCluster
	default:
		return a, fmt.Errorf("%q is no scheme: an address is HOST:PORT, or like %s or %s", scheme+"://", sentinelExample, clusterExample)
	}
	servers, err := readAddresses()(rest)
	if err != nil {
		problems = append(problems, err)
	}
	for _, s := range servers {
		if plain == "rediss" {
			s = "rediss://" + s
		}
		a.servers = append(a.servers, s)
	}
	if len(problems) > 0 {
		return a, fmt.Errorf("%s (an example: %s)", strings.ReplaceAll(errors.Join(problems...).Error(), "\n", "; "), example)
	}
	return a, nil
}
