package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-redsync/redsync/v4"
	lock "github.com/go-redsync/redsync/v4/redis"
	"github.com/gomodule/redigo/redis"
	"github.com/google/uuid"
)

// scriptKeys is the number of keys of each script.
const scriptKeys = 7

// The statuses that the scripts return; see their headers in lua/.
const (
	StatusLate = -1

	AcquireFull   = 0
	AcquireTaken  = 1
	AcquireRepair = 2
	AcquireGaveUp = 3

	HeartbeatRejoined = 0

	ReleaseDone = 1
	ReleaseLeft = 2
)

// ScriptSource returns the text of a script of lua/ as Redis gets it, with the shared
// part.
func ScriptSource(name string) string {
	var text strings.Builder
	for _, part := range []string{"semaphore", name} {
		source, err := os.ReadFile(Path("lua/" + part + ".lua"))
		if err != nil {
			panic(err)
		}
		text.Write(source)
	}
	return text.String()
}

// NewScript makes a script from a text, which a test may have changed.
func NewScript(source string) *redis.Script { return redis.NewScript(scriptKeys, source) }

// Script returns a script of lua/. The program's commands name it by its Hash.
func Script(name string) *redis.Script {
	script, ok := scripts.Load(name)
	if !ok {
		script, _ = scripts.LoadOrStore(name, NewScript(ScriptSource(name)))
	}
	return script.(*redis.Script)
}

var scripts sync.Map // by name

// LoadScripts loads the scripts of lua/, and the one by which redsync unlocks, as a
// webhook does. The statistics of the server begin anew.
func (r *Redis) LoadScripts() error {
	files, err := filepath.Glob(Path("lua/*.lua"))
	for _, file := range files {
		if name := strings.TrimSuffix(filepath.Base(file), ".lua"); err == nil && name != "semaphore" {
			err = Script(name).Load(r.Control)
		}
	}
	if err == nil {
		_, err = r.Control.Do("SCRIPT", "LOAD", unlockSource())
	}
	if err == nil {
		_, err = r.Control.Do("CONFIG", "RESETSTAT")
	}
	return err
}

// unlockSource returns the script by which redsync unlocks, which it does not export.
var unlockSource = sync.OnceValue(func() string {
	var shown shownScript
	_, _ = redsync.New(&shown).NewMutex("").Unlock()
	return shown.source
})

// shownScript is a pool of redsync that runs nothing, and keeps the script.
type shownScript struct{ source string }

func (s *shownScript) Get(context.Context) (lock.Conn, error) { return shownConn{shown: s}, nil }

type shownConn struct {
	lock.Conn
	shown *shownScript
}

func (c shownConn) Eval(script *lock.Script, _ ...any) (any, error) {
	c.shown.source = script.Src
	return int64(1), nil
}

func (c shownConn) Close() error { return nil }

// Timing is the heartbeat interval and the stale threshold of a process.
type Timing struct{ Interval, Threshold time.Duration }

// DefaultTiming is the timing of a process without flags.
var DefaultTiming = Timing{30 * time.Second, 120 * time.Second}

// Flags returns the flags of a process with this timing.
func (t Timing) Flags() []string {
	return []string{fmt.Sprintf("--heartbeat-interval-seconds=%d", seconds(t.Interval)),
		fmt.Sprintf("--stale-threshold-seconds=%d", seconds(t.Threshold))}
}

// Reply is the reply of a script.
type Reply struct {
	Status int
	Micros int64 // the server's time, in Unix microseconds
	Rest   []any
}

// Run runs a script of lua/ for a semaphore, with a distant deadline.
func (r *Redis) Run(name string, id fmt.Stringer, timing Timing, args ...any) (Reply, error) {
	now, err := redis.Ints(r.Control.Do("TIME"))
	if err != nil {
		return Reply{}, err
	}
	deadline := (int64(now[0]) + 3600) * 1e6
	return RunScript(r.Control, Script(name), id, deadline, timing, args...)
}

// RunScript runs a script over a connection. deadline is in Unix microseconds of the
// server's clock.
func RunScript(
	conn redis.Conn, script *redis.Script, id fmt.Stringer, deadline int64, timing Timing, args ...any,
) (reply Reply, err error) {
	timeToLive := max(24*time.Hour, 10*timing.Threshold)
	all := append(idOf(id).Keys(), deadline, seconds(timing.Interval), seconds(timing.Threshold), seconds(timeToLive))
	values, err := redis.Values(script.Do(conn, append(all, args...)...))
	if err == nil {
		reply.Rest, err = redis.Scan(values, &reply.Status, &reply.Micros)
	}
	return reply, err
}

// Acquired is the reply of the acquire script.
type Acquired struct {
	Status int
	Beyond bool // with AcquireTaken: this command took it beyond the length
	Agreed int  // with AcquireTaken: the greatest length that others have asked for recently, or 0
	Stale  int  // with AcquireRepair: the number of stale tokens; if 0, tokens are missing

	Newcomer bool // with AcquireRepair: see lua/maintain.lua

	// With AcquireFull or AcquireGaveUp:
	InUse   int
	Waiters int
	Length  int           // that counts for the caller
	Doubt   time.Duration // if not 0, Redis knows only after this time which holders and waiters are gone
	Holders []any         // for some tokens in use: seconds that it is held, or -1; the pod or the token; 1: not started
	Setting []any         // what the owner has set; see setting in lua/semaphore.lua
	Holds   string        // how long the last pods had their tokens; see addHold there

	// With AcquireFull or AcquireGaveUp, for a waiter:
	Position  int
	Arrival   string
	Ahead     int // microseconds that its place is before its arrival
	Waited    time.Duration
	FreeIn    time.Duration // until a token may come free for it
	Reachable bool
}

// ReadAcquired parses the reply of the acquire script.
func ReadAcquired(reply Reply) (a Acquired, err error) {
	a.Status = reply.Status
	switch reply.Status {
	case AcquireTaken:
		_, err = redis.Scan(reply.Rest, &a.Agreed, &a.Beyond)
	case AcquireRepair:
		_, err = redis.Scan(reply.Rest, &a.Stale, &a.Newcomer)
	case AcquireFull, AcquireGaveUp:
		var doubt, waited, freeIn, reachable int
		var rest []any
		rest, err = redis.Scan(reply.Rest, &a.InUse, &a.Waiters, &a.Length, &doubt, &a.Holders, &a.Setting, &a.Holds)
		if err == nil && len(rest) > 0 {
			_, err = redis.Scan(rest, &a.Position, &a.Arrival, &waited, &freeIn, &reachable, &a.Ahead)
		}
		a.Doubt = time.Duration(doubt) * time.Second
		a.Waited, a.FreeIn = time.Duration(waited)*time.Second, time.Duration(freeIn)*time.Millisecond
		a.Reachable = reachable == 1
	default:
		err = fmt.Errorf("unknown status %d", reply.Status)
	}
	return a, err
}

// TryAcquire asks once for a token. arrival is empty for a client that does not wait, "0"
// to join the line, and otherwise the arrival of the last reply.
func (r *Redis) TryAcquire(id fmt.Stringer, timing Timing, length int, token, arrival, pod string) (Acquired, error) {
	reply, err := r.Run("acquire", id, timing, length, token, arrival, pod)
	if err != nil {
		return Acquired{}, err
	}
	return ReadAcquired(reply)
}

// Acquire takes a token for a pod that does not wait. If necessary, it repairs the
// semaphore first.
func (r *Redis) Acquire(t testing.TB, id fmt.Stringer, length int) (token string) {
	t.Helper()
	token = uuid.NewString()
	Eventually(t, 10*time.Second, func() error {
		a, err := r.TryAcquire(id, DefaultTiming, length, token, "", "")
		switch {
		case err != nil || a.Status == AcquireTaken:
			return err
		case a.Status == AcquireFull:
			t.Fatalf("%s: %d of %d tokens are in use, %d wait", id, a.InUse, length, a.Waiters)
		}
		return errors.Join(errors.New("the semaphore needs a repair"), r.Maintain(id, DefaultTiming, length, true))
	})
	return token
}

// Maintain repairs a semaphore. newcomer: the client was not in line before.
func (r *Redis) Maintain(id fmt.Stringer, timing Timing, length int, newcomer bool) error {
	asks := map[bool]string{true: "1", false: "0"}[newcomer]
	for left := 1; left > 0; { // each run reclaims a portion of the stale tokens
		reply, err := r.Run("maintain", id, timing, length, asks)
		var reclaimed, refilled, trimmed int
		if err == nil {
			_, err = redis.Scan(reply.Rest, &reclaimed, &refilled, &trimmed, &left)
		}
		if err != nil {
			return fmt.Errorf("maintain %s: %w", id, err)
		}
	}
	return nil
}

// Heartbeat keeps a token in use, or restores it (rejoined). held is how long its pod has
// had it.
func (r *Redis) Heartbeat(t testing.TB, id fmt.Stringer, token, pod string, held time.Duration) (rejoined bool) {
	t.Helper()
	reply, err := r.Run("heartbeat", id, DefaultTiming, token, pod, seconds(held))
	Must(t, err)
	return reply.Status == HeartbeatRejoined
}

// Release gives a token back.
func (r *Redis) Release(t testing.TB, id fmt.Stringer, token string) (status int) {
	t.Helper()
	reply, err := r.Run("release", id, DefaultTiming, token)
	Must(t, err)
	return reply.Status
}
