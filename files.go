package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// certificate is a TLS key pair that is reread when its files change.
type certificate struct{ *watchedFile[tls.Certificate] }

// loadCertificate reads tls.crt and tls.key in dir.
func loadCertificate(dir string, log *slog.Logger) (*certificate, error) {
	f, err := newWatchedFile(log, parsePair, func(pair tls.Certificate) {
		serial := fmt.Sprintf("%X", pair.Leaf.SerialNumber) // as openssl prints it
		log.Info("certificate taken", "serialNumber", serial, "notAfter", pair.Leaf.NotAfter, "dnsNames", pair.Leaf.DNSNames)
	}, filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if err != nil {
		return nil, fmt.Errorf("--certDir: %w", err)
	}
	return &certificate{f}, nil
}

func parsePair(texts [][]byte) (tls.Certificate, error) { return tls.X509KeyPair(texts[0], texts[1]) }

// get implements tls.Config.GetCertificate.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return c.current.Load(), nil
}

// readCA reads a file of PEM certificates. For no file it returns nil: the system's
// certificates.
func readCA(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool, err := parseCA([][]byte{text})
	if err != nil {
		return nil, fmt.Errorf("%w in %s", err, file)
	}
	return pool, nil
}

// readPassword reads a file that has one password, with or without a newline.
func readPassword(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	switch password := strings.TrimRight(string(text), "\r\n"); {
	case password == "":
		return "", fmt.Errorf("%s is empty", file)
	case strings.ContainsAny(password, "\r\n"):
		return "", fmt.Errorf("%s has more than one line, not one password", file)
	default:
		return password, nil
	}
}

// errNoCertificate means that a file contains no certificate.
var errNoCertificate = errors.New("no PEM certificate")

func parseCA(texts [][]byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(texts[0]) {
		return nil, errNoCertificate
	}
	return pool, nil
}

// fileInterval is the interval at which files are read and compared. File notifications
// do not work here: the kubelet updates a mounted Secret by replacing a symbolic link.
const fileInterval = time.Second

// watchedFile is a value that is read from files, and reread when they change.
type watchedFile[T any] struct {
	files    []string
	parse    func(texts [][]byte) (T, error) // texts are the contents, in the order of files
	onChange func(T)                         // runs when a value has come into use
	optional bool                            // a file that is not there is empty, unless a mount has others
	current  atomic.Pointer[T]
	refused  atomic.Pointer[error] // why the present content is not in use; nil: it is
	hasRead  bool                  // last is set
	last     []byte                // last content of the files, or the last error of reading them
	log      *slog.Logger
}

// newWatchedFile reads the files. It fails if their content is bad.
func newWatchedFile[T any](log *slog.Logger, parse func(texts [][]byte) (T, error), onChange func(T),
	files ...string) (*watchedFile[T], error) {
	f := &watchedFile[T]{files: files, parse: parse, onChange: onChange, log: log}
	if _, err := f.reload(); err != nil {
		return nil, err
	}
	return f, nil
}

// reload reads the files again. If they have changed since the last call, it takes the
// new value. If that is bad, it returns an error and keeps the old value.
func (f *watchedFile[T]) reload() (changed bool, err error) {
	var texts [][]byte
	for _, file := range f.files {
		text, err := os.ReadFile(file)
		if err != nil && !(f.optional && errors.Is(err, os.ErrNotExist) && !hasKeys(filepath.Dir(file))) {
			f.refused.Store(&err)
			return f.changed([]byte(err.Error())), err
		}
		texts = append(texts, text)
	}
	if !f.changed(bytes.Join(texts, []byte{0})) {
		return false, nil
	}
	value, err := f.parse(texts)
	if err != nil {
		err = fmt.Errorf("%s: %w", strings.Join(f.files, " and "), err)
		f.refused.Store(&err)
		return true, err
	}
	f.current.Store(&value)
	f.refused.Store(nil)
	f.onChange(value)
	return true, nil
}

// hasKeys reports whether a folder is a mounted Secret or ConfigMap that has any key.
func hasKeys(folder string) bool {
	entries, _ := os.ReadDir(filepath.Join(folder, "..data"))
	return len(entries) > 0
}

// changed reports whether content differs from that of the last call.
func (f *watchedFile[T]) changed(content []byte) bool {
	if f.hasRead && bytes.Equal(content, f.last) {
		return false
	}
	f.hasRead, f.last = true, content
	return true
}

// watch reloads every interval until ctx is done. It logs each bad change once. Without
// files, it does nothing.
func (f *watchedFile[T]) watch(ctx context.Context, interval time.Duration) {
	for len(f.files) > 0 && sleep(ctx, interval) == nil {
		if changed, err := f.reload(); changed && err != nil {
			f.log.Error("changed files not taken, what they held before stays in use", "error", err.Error())
		}
	}
}

// ownerFile is the file of the owners' settings. It is reread when it changes; a bad
// content is not taken.
type ownerFile struct{ *watchedFile[ownerSettings] }

// newOwnerFile reads a file, which may be missing. Without a name there are no settings.
// changed runs when there are others.
func newOwnerFile(file string, log *slog.Logger, changed func()) ownerFile {
	f := &watchedFile[ownerSettings]{parse: parseOwnerSettings, optional: true, log: log,
		onChange: func(s ownerSettings) {
			if len(s.lines) > 0 {
				log.Info("settings of semaphores taken", "lines", len(s.lines))
			}
			changed()
		}}
	if file == "" {
		f.current.Store(&ownerSettings{})
		return ownerFile{f}
	}
	f.files = []string{file}
	if _, err := f.reload(); err != nil {
		log.Error("the settings of semaphores are not taken", "error", err.Error())
	}
	return ownerFile{f}
}

// settings returns the last good settings. Its error says why there have been none so
// far.
func (f ownerFile) settings() (ownerSettings, error) {
	refused := f.refused.Load() // before current: it is there once nothing is refused any more
	if s := f.current.Load(); s != nil {
		return *s, nil
	}
	return ownerSettings{}, *refused
}

// ownerSettings are what the owners of resources have set of semaphores: the file
// semaphores.
type ownerSettings struct{ lines map[string]ownerLine } // by NAMESPACE/KEY, NAMESPACE/*, */KEY, or @/KEY

// ownerLine is a line of the file.
type ownerLine struct {
	number     int
	length     int           // 0: paused
	namespaces []string      // that share the semaphore, with * for any characters
	headStart  time.Duration // the greatest of a pod, if capped
	capped     bool
	runs       bool // a pod whose time in line is over may run beyond the length
	overtake   int  // seconds for which others may pass a pod that needs several tokens and does not fit
}

// shared is in the place of the namespace of a semaphore that several namespaces share,
// and begins its key in an annotation.
const shared = "@"

// parseOwnerSettings reads lines of PATTERN WORD=VALUE..., and # comments. Its error has
// all problems, each with the number of its line.
func parseOwnerSettings(texts [][]byte) (ownerSettings, error) {
	s := ownerSettings{map[string]ownerLine{}}
	var problems serverErrors
	n := 0
	for text := range strings.Lines(string(texts[0])) {
		n++
		text, _, _ = strings.Cut(text, "#")
		words := strings.Fields(text)
		if len(words) == 0 {
			continue
		}
		line, err := parseOwnerLine(words[0], words[1:])
		pattern := words[0]
		if strings.HasPrefix(pattern, shared) {
			pattern = shared + "/" + pattern[len(shared):]
		}
		if before, ok := s.lines[pattern]; err == nil && ok {
			err = fmt.Errorf("%s has line %d already", quoteShort(words[0]), before.number)
		}
		if line.number = n; err != nil {
			problems = append(problems, fmt.Errorf("line %d: %w", n, err))
		}
		s.lines[pattern] = line
	}
	if len(problems) > 0 {
		return ownerSettings{}, problems
	}
	return s, nil
}

// parseOwnerLine reads the words of a line.
func parseOwnerLine(pattern string, words []string) (line ownerLine, err error) {
	key, isShared := strings.CutPrefix(pattern, shared)
	namespace, rest, _ := strings.Cut(pattern, "/")
	if !isShared {
		key = rest
	}
	switch {
	case !isShared && (namespace != "*" && !isObjectName(namespace) || key != "*" && checkKey(key) != ""),
		isShared && checkKey(key) != "", !isShared && namespace == "*" && key == "*":
		return line, fmt.Errorf("%s is no semaphore: it must be NAMESPACE/KEY, NAMESPACE/*, */KEY or @KEY", quoteShort(pattern))
	}
	hasLength := false
	for _, word := range words {
		name, value, _ := strings.Cut(word, "=")
		switch {
		case name == "length" && !hasLength:
			line.length, hasLength = parseDigits(value)
			if !hasLength || line.length > maxLength {
				return line, fmt.Errorf("length is %s: it must be a whole number from 0 to %d", quoteShort(value), maxLength)
			}
		case name == "head-start" && !line.capped:
			var n int
			n, line.capped = parseDigits(value)
			if line.headStart = time.Duration(n) * time.Second; !line.capped || n > mostHeadStart {
				return line, fmt.Errorf("head-start is %s: it must be a whole number from 0 to %d",
					quoteShort(value), mostHeadStart)
			}
		case name == "overtake" && line.overtake == 0:
			var ok bool
			if line.overtake, ok = parseDigits(value); !ok || line.overtake < 1 || line.overtake > mostOvertake {
				return line, fmt.Errorf("overtake is %s: it must be a whole number from 1 to %d",
					quoteShort(value), mostOvertake)
			}
		case word == "when-waited=run" && !line.runs:
			line.runs = true
		case name == "namespaces" && isShared && line.namespaces == nil:
			line.namespaces = strings.Split(value, ",")
			for _, namespace := range line.namespaces {
				if !isObjectName(strings.ReplaceAll(namespace, "*", "x")) {
					return line, fmt.Errorf("namespaces has %s: it must be names, with commas between them, and * for any characters",
						quoteShort(namespace))
				}
			}
		case name == "namespaces" && !isShared:
			return line, fmt.Errorf("only a semaphore that begins with %s has namespaces", shared)
		default:
			return line, fmt.Errorf("%s is unknown, or there twice: there are length=N, head-start=SECONDS, overtake=SECONDS, "+
				"when-waited=run and, with @KEY, namespaces=LIST", quoteShort(word))
		}
	}
	if !hasLength {
		return line, errors.New("length=N is missing")
	}
	if isShared && line.namespaces == nil {
		return line, errors.New("namespaces=NAME,... is missing: no namespace could use it")
	}
	return line, nil
}

// lineOf returns the most exact line for a semaphore; ok is false if there is none.
func (s ownerSettings) lineOf(namespace, key string) (line ownerLine, ok bool) {
	patterns := []string{namespace + "/" + key}
	if namespace != shared {
		patterns = append(patterns, namespace+"/*", "*/"+key)
	}
	for _, pattern := range patterns {
		if line, ok := s.lines[pattern]; ok {
			return line, true
		}
	}
	return ownerLine{}, false
}

// named returns the semaphores, as NAMESPACE/KEY, that have a line of their own.
func (s ownerSettings) named() (all []string) {
	for pattern := range s.lines {
		if !strings.Contains(pattern, "*") {
			all = append(all, pattern)
		}
	}
	return all
}

// mayShare returns why a namespace may not use a shared semaphore, or nil.
func (s ownerSettings) mayShare(namespace, key string) error {
	line, ok := s.lines[shared+"/"+key]
	if !ok {
		return fmt.Errorf("%s%s is not in the ConfigMap semaphores", shared, key)
	}
	if slices.ContainsFunc(line.namespaces, func(pattern string) bool {
		matches, _ := path.Match(pattern, namespace) // the pattern was checked
		return matches
	}) {
		return nil
	}
	return fmt.Errorf("%s%s is not for the namespace %s: by the ConfigMap semaphores, it is for %s",
		shared, key, namespace, strings.Join(line.namespaces, ", "))
}

// sharedBy returns the keys of the shared semaphores that a namespace may use, in their
// order.
func (s ownerSettings) sharedBy(namespace string) (keys []string) {
	for pattern := range s.lines {
		if key, ok := strings.CutPrefix(pattern, shared+"/"); ok && s.mayShare(namespace, key) == nil {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}
