package main

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// usageError says what is wrong with the command line, all of it at once.
type usageError struct {
	problems []string
	help     string // printed below the problems, if not empty
}

func (e *usageError) Error() string {
	if len(e.problems) == 1 {
		return e.problems[0]
	}
	return fmt.Sprintf("%d wrong settings:\n  %s", len(e.problems), strings.Join(e.problems, "\n  "))
}

// helpRequest is the error for --help.
type helpRequest struct{ text string }

func (*helpRequest) Error() string { return "help requested" }

// flags is a flag set that collects wrong values instead of stopping at the first: all flags are read as
// text, and the typed readers below note what is wrong.
type flags struct {
	*flag.FlagSet
	synopsis string
	problems []string
}

func newFlags(mode, synopsis string) *flags {
	f := &flags{FlagSet: flag.NewFlagSet(mode, flag.ContinueOnError), synopsis: synopsis}
	f.SetOutput(io.Discard)
	return f
}

func (f *flags) parse(args []string) error {
	err := f.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return &helpRequest{f.help()}
	}
	if err != nil {
		return &usageError{problems: []string{f.Name() + ": " + err.Error()}, help: f.help()}
	}
	return nil
}

func (f *flags) help() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: at-least-semaphore-pod-hook %s\n\nFlags:\n", f.synopsis)
	f.VisitAll(func(fl *flag.Flag) {
		name, text := flag.UnquoteUsage(fl)
		fmt.Fprintf(&b, "  --%s %s\n        %s", fl.Name, name, text)
		if fl.DefValue != "" {
			fmt.Fprintf(&b, " (default %s)", fl.DefValue)
		}
		b.WriteByte('\n')
	})
	b.WriteString("\nEnvironment:\n" +
		"  REDIS_USERNAME, REDIS_PASSWORD  credentials of all Redis servers; no user name for the default user\n" +
		"  ETCD_USERNAME, ETCD_PASSWORD    credentials of the etcd servers\n")
	if f.Name() == "sidecar" {
		b.WriteString("  POD_UID                         the pod's UID, by which its startup probe finds the sidecar\n")
	}
	return b.String()
}

// result is nil, or an error that names all problems.
func (f *flags) result() error {
	if len(f.problems) == 0 {
		return nil
	}
	return &usageError{problems: f.problems}
}

func (f *flags) problem(name, format string, args ...any) {
	f.problems = append(f.problems, "--"+name+": "+fmt.Sprintf(format, args...))
}

// boolText is a flag that may stand without a value, and is only judged after parsing.
type boolText string

func (b *boolText) String() string     { return string(*b) }
func (b *boolText) Set(s string) error { *b = boolText(s); return nil }
func (b *boolText) IsBoolFlag() bool   { return true }

func (f *flags) number(name, text string, least, most int) int {
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		f.problem(name, "%q is not a whole number from %d to %d", text, least, most)
	}
	return n
}

func (f *flags) seconds(name, text string, least, most int) time.Duration {
	return time.Duration(f.number(name, text, least, most)) * time.Second
}

// addressPattern is what can be shown of a wrong address: nothing that might hold a password.
var addressPattern = regexp.MustCompile(`^[A-Za-z0-9.-]*(:[0-9]*)?$`)

// address reads HOST:PORT, with or without one of the schemes before it.
func (f *flags) address(name, text string, schemes ...string) string {
	hostPort := text
	for _, s := range schemes {
		hostPort = strings.TrimPrefix(hostPort, s)
	}
	if _, port, err := net.SplitHostPort(hostPort); err == nil && isPort(port) {
		return text
	}
	shown := "an address"
	if addressPattern.MatchString(hostPort) {
		shown = strconv.Quote(text)
	}
	want := "HOST:PORT"
	for _, s := range schemes {
		want += " or " + s + "HOST:PORT"
	}
	f.problem(name, "%s is not %s", shown, want)
	return text
}

// addresses reads a list without repetitions: a server that is named twice would count twice in a quorum.
func (f *flags) addresses(name, text string, schemes ...string) []string {
	if strings.Contains(text, "@") || strings.Contains(text, "%40") {
		f.problem(name, "there are no credentials in an address: they come from the environment, see --help")
		return nil
	}
	var list []string
	for a := range strings.SplitSeq(text, ",") {
		a = f.address(name, strings.TrimSpace(a), schemes...)
		if slices.Contains(list, a) && addressPattern.MatchString(a[strings.LastIndexByte(a, '/')+1:]) {
			f.problem(name, "%q is named twice", a)
		}
		list = append(list, a)
	}
	return list
}

// keyPair reads the names of a PEM certificate and its key; empty for none.
func (f *flags) keyPair(certName, certFile, keyName, keyFile string) (string, string) {
	if certFile == "" && keyFile == "" {
		return "", ""
	}
	if certFile == "" || keyFile == "" {
		f.problems = append(f.problems, fmt.Sprintf("--%s and --%s go together", certName, keyName))
	} else if _, err := tls.LoadX509KeyPair(certFile, keyFile); err != nil {
		f.problem(certName, "%v", err)
	}
	return certFile, keyFile
}

// certificates reads the name of a file of PEM certificates; empty for none.
func (f *flags) certificates(name, path string) string {
	if _, err := readCA(path); err != nil {
		f.problem(name, "%v", err)
	}
	return path
}

var objectNamePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)

func (f *flags) objectName(name, text string) string {
	if text != "" && (len(text) > 253 || !objectNamePattern.MatchString(text)) {
		f.problem(name, "%q is not the name of an object", text)
	}
	return text
}

func (f *flags) object(name, text string) objectReference {
	if text == "" {
		return objectReference{}
	}
	kind, object, _ := strings.Cut(text, "/")
	if kind != "secret" && kind != "configmap" || object == "" {
		f.problem(name, "%q is not secret/NAME or configmap/NAME", text)
	}
	return objectReference{kind, f.objectName(name, object)}
}

// oneAddress reads a list of one.
func (f *flags) oneAddress(name, text string, schemes ...string) string {
	list := f.addresses(name, text, schemes...)
	if len(list) > 1 {
		f.problem(name, "is one address, not %d", len(list))
	}
	return text
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}
