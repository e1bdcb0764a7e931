package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// page is all that a browser gets but data: its style and its script are in it.
//
//go:embed deploy/status/page.html
var page string

const (
	// sampleEvery is the time between two points of the charts, and samplesKept their number:
	// an hour.
	sampleEvery = 30 * time.Second
	samplesKept = 120

	// chartsMost caps the semaphores that have a chart: one takes 2 KB.
	chartsMost = 5000
)

// sample is how a semaphore was used at one time. A negative InUse is not known.
type sample struct {
	InUse   int `json:"inUse"`
	Waiting int `json:"waiting"`
}

// statusServer serves the page, and what it shows. It changes nothing.
type statusServer struct {
	semaphores *semaphores
	reads      flights[semaphoreID, *pageData] // of one semaphore, for all browsers; zero: of all semaphores

	mu     sync.Mutex
	taken  int // samples so far
	charts map[semaphoreID]*[samplesKept]sample
}

func newStatusServer(s *semaphores) *statusServer {
	return &statusServer{semaphores: s, charts: map[semaphoreID]*[samplesKept]sample{}}
}

// pageData is what the page shows: all semaphores, or one.
type pageData struct {
	Summary []string `json:"summary"`
	Tables  []table  `json:"tables"`
	Names   []string `json:"names"` // of the semaphores in the first table; or of this one
	Chart   []sample `json:"chart"` // of one semaphore, the oldest first
	Error   string   `json:"error"` // why not all could be read
}

// serveStatus serves the page until ctx is done.
func serveStatus(ctx context.Context, s *semaphores, c statusConfig, log *slog.Logger) error {
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", c.port))
	if err != nil {
		return fmt.Errorf("serve the page: %w; for another port, use --port", err)
	}
	v := newStatusServer(s)
	server := &http.Server{Handler: v.handler(), ReadHeaderTimeout: statusTimeout, MaxHeaderBytes: maxHeaderSize,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn)}
	log.Info("serving the page", "address", "http://"+listener.Addr().String())
	go v.sampleRepeatedly(ctx)
	context.AfterFunc(ctx, func() { server.Close() })
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// handler answers the page only. Another one in the same browser gets no answer, also not
// under a name of its own that leads to this machine.
func (v *statusServer) handler() http.Handler {
	policy := "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; " +
		"connect-src 'self'; img-src data:; style-src " + hashOf("style") + "; script-src " + hashOf("script")
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", policy)
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-store")
		switch {
		case !isLoopback(r.Host):
			http.Error(w, "this page is at localhost only, not at "+quoteShort(r.Host), http.StatusMisdirectedRequest)
		case r.Header.Get("Sec-Fetch-Site") == "cross-site" || r.Header.Get("Sec-Fetch-Site") == "same-site":
			http.Error(w, "another page may not read this one", http.StatusForbidden)
		case r.Method != http.MethodGet:
			http.Error(w, "this page changes nothing: GET only", http.StatusMethodNotAllowed)
		case r.URL.Path == "/":
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprint(w, page)
		case r.URL.Path == "/data":
			v.data(w, r)
		default:
			http.NotFound(w, r)
		}
	})
}

// hashOf returns the only content of an element that a browser may use.
func hashOf(element string) string {
	_, rest, _ := strings.Cut(page, "<"+element+">")
	text, _, _ := strings.Cut(rest, "</"+element+">")
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// isLoopback reports whether HOST or HOST:PORT is this machine, by a name that no other can
// have.
func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = strings.Trim(address, "[]")
	}
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// data answers with the semaphore that the query names, or with all.
func (v *statusServer) data(w http.ResponseWriter, r *http.Request) {
	var id semaphoreID
	if name := r.URL.Query().Get("semaphore"); name != "" {
		var ok bool
		if id, ok = parseSemaphoreID(name); !ok {
			http.Error(w, quoteShort(name)+" is no name of a semaphore", http.StatusBadRequest)
			return
		}
	}
	read := v.reads.join(id, &pageData{Tables: []table{}}, func(d *pageData) error {
		ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
		defer cancel()
		if id == (semaphoreID{}) {
			return v.readAll(ctx, d)
		}
		return v.readOne(ctx, d, id)
	})
	select {
	case <-read.done:
	case <-r.Context().Done():
		return
	}
	d := *read.state
	if read.err != nil {
		d.Error = read.err.Error()
	}
	w.Header().Set("Content-Type", "application/json")
	_ = printJSON(w, d)
}

func (v *statusServer) readAll(ctx context.Context, d *pageData) error {
	states, err := v.semaphores.survey(ctx, "")
	if err != nil && len(states) > 0 {
		err = fmt.Errorf("not all could be seen: %w", err)
	}
	if len(states) == 0 && err == nil {
		d.Summary = []string{noneUsed("")}
	}
	d.Tables = []table{tableOf(states)}
	for _, st := range states {
		d.Names = append(d.Names, st.id.String())
	}
	return err
}

func (v *statusServer) readOne(ctx context.Context, d *pageData, id semaphoreID) error {
	one, err := v.semaphores.inspect(ctx, id, detailMost)
	if err != nil {
		return err
	}
	past, err := v.semaphores.history(ctx, id)
	d.Summary, d.Names = one.summary(), []string{id.String()}
	d.Tables = []table{one.holderTable(), one.lineTable(), historyTable(past)}
	d.Chart = v.chart(id)
	return err
}

// chart returns the samples of a semaphore; those before its first are not known.
func (v *statusServer) chart(id semaphoreID) (all []sample) {
	v.mu.Lock()
	defer v.mu.Unlock()
	ring, ok := v.charts[id]
	for i := v.taken; ok && i < v.taken+samplesKept; i++ {
		all = append(all, ring[i%samplesKept])
	}
	return all
}

// sampleRepeatedly takes samples until ctx is done.
func (v *statusServer) sampleRepeatedly(ctx context.Context) {
	for next := time.Now(); sleep(ctx, time.Until(next)) == nil; next = next.Add(sampleEvery) {
		reading, cancel := context.WithTimeout(ctx, statusTimeout)
		states, err := v.semaphores.survey(reading, "")
		cancel()
		v.take(states, err == nil)
	}
}

// take adds a sample to each chart. Without one for an hour, a semaphore has none. Unless all
// could be read, one that is missing is not known; else it is unused.
func (v *statusServer) take(states []semaphoreState, all bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	at := v.taken % samplesKept
	v.taken++
	unknown := sample{InUse: -1}
	for _, ring := range v.charts {
		if ring[at] = unknown; all {
			ring[at] = sample{}
		}
	}
	for _, st := range states {
		ring := v.charts[st.id]
		if ring == nil {
			if len(v.charts) >= chartsMost {
				continue
			}
			ring = new([samplesKept]sample)
			for i := range ring {
				ring[i] = unknown
			}
			v.charts[st.id] = ring
		}
		ring[at] = sample{st.inUse, st.waiting}
	}
	for id, ring := range v.charts {
		if isUnused(ring) {
			delete(v.charts, id)
		}
	}
}

// isUnused reports whether no sample of an hour shows a use.
func isUnused(ring *[samplesKept]sample) bool {
	for _, s := range ring {
		if s.InUse > 0 || s.Waiting > 0 {
			return false
		}
	}
	return true
}
