package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// followInterval is how often files are looked at. They are read and compared: the kubelet changes a mounted Secret by a symbolic
// link, which notifications on the files do not show.
const followInterval = time.Second

// followed is what is read from files, and follows them when they change.
type followed[T any] struct {
	files   []string
	parse   func(texts [][]byte) (T, error) // of the files, in their order
	taken   func(T)                         // is told, and logs, what is in use a moment later
	current atomic.Pointer[T]
	looked  bool   // there is something seen
	seen    []byte // content of the files, good or bad
	log     *slog.Logger
}

// follow reads the files, which have to be good.
func follow[T any](log *slog.Logger, parse func(texts [][]byte) (T, error), taken func(T), files ...string) (*followed[T], error) {
	f := &followed[T]{files: files, parse: parse, taken: taken, log: log}
	if _, err := f.reload(); err != nil {
		return nil, err
	}
	return f, nil
}

// reload reads the files again. If they have changed since the last call, it takes what they hold, or says what is wrong with it and
// keeps what was there before.
func (f *followed[T]) reload() (changed bool, err error) {
	var texts [][]byte
	for _, file := range f.files {
		text, err := os.ReadFile(file)
		if err != nil {
			return f.see([]byte(err.Error())), err
		}
		texts = append(texts, text)
	}
	if !f.see(bytes.Join(texts, []byte{0})) {
		return false, nil
	}
	value, err := f.parse(texts)
	if err != nil {
		return true, fmt.Errorf("%s: %w", strings.Join(f.files, " and "), err)
	}
	f.taken(value)
	f.current.Store(&value)
	return true, nil
}

// see remembers what was seen and reports whether it is new.
func (f *followed[T]) see(what []byte) bool {
	if f.looked && bytes.Equal(what, f.seen) {
		return false
	}
	f.looked, f.seen = true, what
	return true
}

// watch reloads every interval until ctx is done, and logs each bad change once.
func (f *followed[T]) watch(ctx context.Context, interval time.Duration) {
	for sleep(ctx, interval) == nil {
		if changed, err := f.reload(); changed && err != nil {
			f.log.Error("changed files not taken, what they held before stays in use", "error", err.Error())
		}
	}
}
