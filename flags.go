package main

import (
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

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
)

// version is the release, set by the linker: -ldflags "-X main.version=v1.2.3".
var version = "dev"

// usageError lists all problems of the command line.
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

// helpRequest is the error that --help returns.
type helpRequest struct{ text string }

func (*helpRequest) Error() string { return "help requested" }

// flags is a flag set that collects wrong values instead of stopping at the first.
type flags struct {
	*flag.FlagSet
	arguments string          // text after the mode in the help
	reads     []func()        // parse each flag's text into its field
	wrong     map[string]bool // flags whose value alone is wrong
	problems  []string
	operands  []string // arguments that are no flags; flags may follow them
}

// NArg returns the number of operands.
func (f *flags) NArg() int { return len(f.operands) }

// Arg returns an operand.
func (f *flags) Arg(i int) string { return f.operands[i] }

// parse collects the texts of the flags, and the operands.
func (f *flags) parse(args []string) error {
	for {
		if err := f.Parse(args); err != nil {
			return err
		}
		rest := f.Args()
		if len(rest) == 0 {
			return nil
		}
		f.operands, args = append(f.operands, rest[0]), rest[1:]
	}
}

// config is the settings of one mode.
type config interface {
	declareFlags(f *flags, getenv func(string) string) // also reads the environment
	validate(f *flags)                                 // notes the problems of combinations of settings
}

// parseFlags reads the command line and the environment into c. Its error is a
// *helpRequest, or a *usageError that lists all problems. An unknown flag is reported
// alone.
func parseFlags(c config, mode, arguments string, args []string, getenv func(string) string) error {
	f := &flags{FlagSet: flag.NewFlagSet(mode, flag.ContinueOnError), arguments: arguments, wrong: map[string]bool{}}
	f.SetOutput(io.Discard)
	c.declareFlags(f, getenv)
	switch err := f.parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return &helpRequest{f.help()}
	case err != nil:
		return &usageError{problems: []string{mode + ": " + err.Error()}, help: f.help()}
	}
	for _, read := range f.reads {
		read()
	}
	c.validate(f)
	if len(f.problems) > 0 {
		return &usageError{problems: f.problems}
	}
	return nil
}

// reader parses the text of one kind of flag. Its error has one problem a line, like that
// of errors.Join. validate also sees the value that comes with an error.
type reader[T any] func(text string) (T, error)

// declare adds a flag for field. value is its default, as a user would write it. If the
// default is empty, the flag may be empty, too, and field stays zero. A bool flag needs
// no value.
func declare[T any](f *flags, field *T, read reader[T], name, value, usage string) {
	_, isBool := any(field).(*bool)
	v := &flagText{value, isBool}
	f.Var(v, name, usage)
	f.reads = append(f.reads, func() {
		if v.text == "" && value == "" {
			return
		}
		var err error
		if *field, err = read(v.text); err == nil {
			return
		}
		f.wrong[name] = true
		for problem := range strings.SplitSeq(err.Error(), "\n") {
			f.problem("--%s: %s", name, problem)
		}
	})
}

// flagText keeps the text of a flag, right or wrong, until parseFlags has all of them.
type flagText struct {
	text   string
	isBool bool
}

func (t *flagText) String() string     { return t.text }
func (t *flagText) Set(s string) error { t.text = s; return nil }
func (t *flagText) IsBoolFlag() bool   { return t.isBool }

// setDefault changes the default of a declared flag.
func (f *flags) setDefault(name, text string) {
	fl := f.Lookup(name)
	fl.DefValue = text
	_ = fl.Value.Set(text) // flagText never fails
}

// problem notes a problem of the command line or the environment.
func (f *flags) problem(format string, args ...any) {
	f.problems = append(f.problems, fmt.Sprintf(format, args...))
}

func (f *flags) help() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: at-least-semaphore-pod-hook %s %s\n\nFlags:\n", f.Name(), f.arguments)
	f.VisitAll(func(fl *flag.Flag) {
		name, text := flag.UnquoteUsage(fl)
		dashes := "--"
		if len(fl.Name) == 1 {
			dashes = "-"
		}
		fmt.Fprintf(&b, "  %s%s %s\n        %s", dashes, fl.Name, name, text)
		if fl.DefValue != "" {
			fmt.Fprintf(&b, " (default %s)", fl.DefValue)
		}
		b.WriteByte('\n')
	})
	b.WriteString("\nEnvironment:\n")
	if f.Name() != "setup" { // its other secrets are in Kubernetes
		b.WriteString("  REDIS_USERNAME, REDIS_PASSWORD    credentials for all Redis servers; without a name, the default user\n")
	}
	b.WriteString("  REDIS_SENTINEL_USERNAME, REDIS_SENTINEL_PASSWORD\n" +
		"                                    credentials for the Sentinels\n")
	if f.Name() == "setup" {
		return b.String()
	}
	if f.Name() == "status" {
		b.WriteString("  STATUS_REDIS_USERNAME, STATUS_REDIS_PASSWORD, STATUS_REDIS_PASSWORD_FILE\n" +
			"                                    replace REDIS_USERNAME and REDIS_PASSWORD if the password or the file is set; " +
			"the file is the default of --redis-password-file\n" +
			"  QUEUE_REDIS_ADDRESS, REDIS_CA_FILE, HEARTBEAT_INTERVAL_SECONDS, STALE_THRESHOLD_SECONDS\n" +
			"                                    defaults of the flags; set in the containers of webhook, gate and sidecar\n" +
			"  SEMAPHORE                         what status shows without an argument; set in the container of a sidecar\n" +
			"  USER, HOSTNAME                    who sets or pauses, as status shows it\n")
		return b.String()
	}
	b.WriteString("  ETCD_USERNAME, ETCD_PASSWORD      credentials for the etcd servers\n")
	if f.Name() == "sidecar" {
		b.WriteString("  POD_UID                           the pod's UID, by which await finds the sidecar\n" +
			"  POD_NAME, NODE_NAME               the pod's name and its node, which status shows\n" +
			"  POD_NAMESPACE                     its namespace, for a semaphore that several share\n")
	}
	return b.String()
}

func readText(text string) (string, error) { return text, nil }

func readNonEmpty(text string) (string, error) {
	if text == "" {
		return "", errors.New("is empty")
	}
	return text, nil
}

// readNameList reads names, separated by commas.
func readNameList(text string) (names []string, err error) {
	for name := range strings.SplitSeq(text, ",") {
		names = append(names, strings.TrimSpace(name))
	}
	if slices.Contains(names, "") {
		return nil, fmt.Errorf("%q has an empty name", text)
	}
	return names, nil
}

// readNamespace reads the name of one namespace.
func readNamespace(text string) (string, error) {
	names, err := readNamespaces(text)
	if len(names) > 1 {
		err = errors.Join(err, fmt.Errorf("is one namespace, not %d", len(names)))
	}
	return text, err
}

// readNamespaces reads names of namespaces, separated by commas.
func readNamespaces(text string) ([]string, error) {
	names, err := readNameList(text)
	problems := []error{err}
	for i, name := range names {
		switch {
		case len(validation.IsDNS1123Label(name)) > 0:
			problems = append(problems, fmt.Errorf("%q is not the name of a namespace", name))
		case slices.Contains(names[:i], name):
			problems = append(problems, fmt.Errorf("%q is named twice", name))
		}
	}
	return names, errors.Join(problems...)
}

// readIf reads text for which ok is true. Its error says that any other text is not
// wanted.
func readIf(ok func(text string) bool, wanted string) reader[string] {
	return func(text string) (string, error) {
		if !ok(text) {
			return text, fmt.Errorf("%q is not %s", text, wanted)
		}
		return text, nil
	}
}

var (
	readImage = readIf(regexp.MustCompile(`^[^ \t\n]+$`).MatchString, "an image")

	readObjectName = readIf(func(text string) bool {
		return isObjectName(text) && strings.TrimRight(text, ".-") == text
	}, "the name of an object")
)

func readChoice(choices ...string) reader[string] {
	return readIf(func(text string) bool { return slices.Contains(choices, text) }, strings.Join(choices, " or "))
}

func readBool(text string) (bool, error) {
	b, err := strconv.ParseBool(text)
	if err != nil {
		err = fmt.Errorf("%q is not true or false", text)
	}
	return b, err
}

func readNumber(least, most int) reader[int] {
	return func(text string) (int, error) {
		n, err := strconv.Atoi(text)
		if err != nil || n < least || n > most {
			err = fmt.Errorf("%q is not a whole number from %d to %d", text, least, most)
		}
		return n, err
	}
}

func readSeconds(least, most int) reader[time.Duration] {
	return func(text string) (time.Duration, error) {
		n, err := readNumber(least, most)(text)
		return time.Duration(n) * time.Second, err
	}
}

// safeAddress matches the wrong addresses that a message may show: they cannot contain a
// password.
var safeAddress = regexp.MustCompile(`^[A-Za-z0-9.-]*(:[0-9]*)?$`)

// readAddresses reads a list of HOST:PORT, each with or without one of the schemes. It
// refuses repeated addresses: such a server would count twice in a quorum.
func readAddresses(schemes ...string) reader[[]string] {
	return func(text string) ([]string, error) {
		if strings.Contains(text, "@") || strings.Contains(text, "%40") {
			return []string{text}, errors.New("there are no credentials in an address: " +
				"they come from the environment, see --help")
		}
		var list []string
		var problems []error
		for a := range strings.SplitSeq(text, ",") {
			a = strings.TrimSpace(a)
			problems = append(problems, checkAddress(a, schemes))
			if slices.Contains(list, a) && safeAddress.MatchString(a[strings.LastIndexByte(a, '/')+1:]) {
				problems = append(problems, fmt.Errorf("%q is named twice", a))
			}
			list = append(list, a)
		}
		return list, errors.Join(problems...)
	}
}

// readAddress reads one address.
func readAddress(schemes ...string) reader[string] {
	return func(text string) (string, error) {
		list, err := readAddresses(schemes...)(text)
		if len(list) > 1 {
			err = errors.Join(err, fmt.Errorf("is one address, not %d", len(list)))
		}
		return strings.Join(list, ","), err
	}
}

func checkAddress(address string, schemes []string) error {
	hostPort, want := address, "HOST:PORT"
	for _, s := range schemes {
		hostPort = strings.TrimPrefix(hostPort, s)
		want += " or " + s + "HOST:PORT"
	}
	if _, port, err := net.SplitHostPort(hostPort); err == nil && isPort(port) {
		return nil
	}
	shown := "an address"
	if safeAddress.MatchString(hostPort) {
		shown = strconv.Quote(address)
	}
	return fmt.Errorf("%s is not %s", shown, want)
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// readCAFile reads the name of a file, and checks that the file has PEM certificates.
func readCAFile(text string) (string, error) {
	_, err := readCA(text)
	return text, err
}

// readPasswordFile reads the name of a file, and checks that the file has a password.
func readPasswordFile(text string) (string, error) {
	_, err := readPassword(text)
	return text, err
}

// readResources reads a list of resources, such as cpu=100m,memory=64Mi.
func readResources(text string) (corev1.ResourceList, error) {
	list := corev1.ResourceList{}
	for part := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		quantity, err := resource.ParseQuantity(value)
		switch _, twice := list[corev1.ResourceName(name)]; {
		case err != nil || quantity.Sign() <= 0 || len(validation.IsQualifiedName(name)) > 0:
			return list, fmt.Errorf("%q is not RESOURCE=QUANTITY, such as cpu=100m or memory=64Mi", part)
		case twice:
			return list, fmt.Errorf("%s is named twice", name)
		}
		list[corev1.ResourceName(name)] = quantity
	}
	return list, nil
}

// readAnnotations reads a list of annotations. Commas in values need no escapes: a part
// without = belongs to the value before it.
func readAnnotations(text string) (map[string]string, error) {
	annotations := map[string]string{}
	var last string
	for part := range strings.SplitSeq(text, ",") {
		name, value, ok := strings.Cut(part, "=")
		name = strings.TrimSpace(name)
		_, twice := annotations[name]
		switch {
		case !ok && last != "":
			annotations[last] += "," + part
			continue
		case !ok || len(validation.IsQualifiedName(name)) > 0:
			return annotations, fmt.Errorf("%q is not NAME=VALUE, with the name of an annotation", part)
		case strings.HasPrefix(name, annotationPrefix):
			return annotations, fmt.Errorf("%s is for pods to set, or for the webhook itself", name)
		case twice:
			return annotations, fmt.Errorf("%s is named twice", name)
		}
		annotations[name], last = value, name
	}
	return annotations, nil
}

func readObject(text string) (objectReference, error) {
	kind, name, _ := strings.Cut(text, "/")
	object := objectReference{kind, name}
	if kind != "secret" && kind != "configmap" || name == "" {
		return object, fmt.Errorf("%q is not secret/NAME or configmap/NAME", text)
	}
	_, err := readObjectName(name)
	return object, err
}

// objectReference names a Secret or a ConfigMap. The zero value names none.
type objectReference struct{ kind, name string }
