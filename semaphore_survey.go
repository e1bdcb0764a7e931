package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/prometheus/client_golang/prometheus"
)

// A survey reads the state of the queue. Its commands change nothing, and none makes
// Redis scan all its keys at once. For metrics, a surveyor also shortens the life of
// abandoned semaphores; see expireAbandoned.
const (
	scanCount   = 1000 // keys that Redis examines in one step
	surveyBatch = 100  // semaphores of one round trip
	detailMost  = 1000 // holders, and waiters, of a semaphore that are shown
)

// semaphoreState is the state of a semaphore at one moment.
type semaphoreState struct {
	id              semaphoreID
	length          int           // the greatest that pods asked for lately; 0 if none has
	free            int           // tokens in the queue
	inUse           int           // tokens in flight
	late            int           // those in flight that have missed a heartbeat, with the stale ones
	stale           int           // those in flight that are stale
	waiting         int           // pods in line
	longestWait     time.Duration // of the first in line
	oldestHeartbeat time.Duration // since the oldest
	reclaimed       int           // stale tokens that were taken back since Redis knows the semaphore
	rejoined        int           // tokens that their holders put back
	gaveUp          int           // waiters whose time was over, and that left the line
	ranBeyond       int           // and those that took a token beyond the length
	holds           holds         // how long the last pods had their tokens
	setting         setting       // what the owner has set; an override only while it is in force
	kept            time.Duration // that the keys live at least, for what the owner has set
	created         time.Time     // when Redis began to know the semaphore
	abandoned       bool          // no command came for long: its tokens and places count no more
	touched         float64       // when the last command came, in Unix seconds
	first           string        // the first in line, when the survey began to read the semaphore
	timing                        // of its holders
}

const (
	// unheardMost is the silence after which a waiter counts no more. The scripts drop it
	// earlier, but only while others send commands. A semaphore is abandoned after the same
	// time, or after the threshold if that is longer.
	unheardMost = 3 * time.Minute

	// abandonedLife is the time to live of an abandoned semaphore, or the threshold if that
	// is longer. The next command of a holder or waiter ends it: see finish in semaphore.lua.
	abandonedLife = 5 * time.Minute
)

// timing judges holders. The scripts do the same; see semaphore.lua.
type timing struct{ interval, threshold time.Duration }

// lateAfter is the age of a heartbeat whose holder has missed one.
func (t timing) lateAfter() time.Duration { return t.interval + min(beatTimeout, t.interval) }

// staleAfter is the age of a heartbeat whose token is stale.
func (t timing) staleAfter() time.Duration { return max(t.threshold, 2*t.lateAfter()) }

// timing returns the timing of this process. That of a semaphore may be longer.
func (s *semaphores) timing() timing { return timing{s.heartbeatInterval, s.staleThreshold} }

// spoiltErrors are semaphores whose keys another client has replaced: the user of a
// namespace can. They must not keep others out.
type spoiltErrors struct{ serverErrors }

// orNil returns the errors as one, or nil.
func (e *spoiltErrors) orNil() error {
	if len(e.serverErrors) == 0 {
		return nil
	}
	return *e
}

// add adds an error of this kind, and returns one of another kind.
func (e *spoiltErrors) add(err error) (other error) {
	var more spoiltErrors
	if err != nil && !errors.As(err, &more) {
		return err
	}
	e.serverErrors = append(e.serverErrors, more.serverErrors...)
	return nil
}

// survey returns the state of all semaphores of a namespace, or of all namespaces, in the
// order of their names. If it cannot read all before ctx is done, it returns those that
// it has read, and an error. The error is spoiltErrors if only such semaphores are left
// out.
func (s *semaphores) survey(ctx context.Context, namespace string) ([]semaphoreState, error) {
	servers, err := s.queue.primaries(ctx)
	if err != nil {
		return nil, err
	}
	pattern := "state/{*}"
	if namespace != "" {
		pattern = "state/{" + globQuote(namespace) + "/*}"
	}
	type result struct {
		states []semaphoreState
		err    error
	}
	var states []semaphoreState
	var errs serverErrors
	var spoilt spoiltErrors
	_ = fanOut(ctx, servers, func(ctx context.Context, server *queueServer) (some result, _ error) {
		if some.states, some.err = s.surveyServer(ctx, server, pattern); some.err != nil {
			some.err = fmt.Errorf("%s: %w", server, some.err)
		}
		return some, nil
	}, func(some result) (enough bool) {
		states = append(states, some.states...)
		if err := spoilt.add(some.err); err != nil {
			errs = append(errs, err)
		}
		return false
	})
	slices.SortFunc(states, func(a, b semaphoreState) int { return cmp.Compare(a.id.String(), b.id.String()) })
	// A semaphore that moved between nodes meanwhile may be there twice.
	states = slices.CompactFunc(states, func(a, b semaphoreState) bool { return a.id == b.id })
	if len(errs) > 0 {
		return states, append(errs, spoilt.serverErrors...)
	}
	return states, spoilt.orNil()
}

// globQuote escapes the wildcards of a Redis pattern.
func globQuote(text string) string {
	return strings.NewReplacer(`*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`, `\`, `\\`).Replace(text)
}

// surveyServer finds the semaphores on a server, and reads each batch as soon as it is
// found.
func (s *semaphores) surveyServer(ctx context.Context, server *queueServer,
	pattern string) (states []semaphoreState, err error) {
	defer func() { s.noteReadError(server, semaphoreID{}, err) }()
	conn, err := server.pool.GetContext(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	seen := map[semaphoreID]bool{} // SCAN may return a key twice
	var spoilt spoiltErrors
	err = eachKey(ctx, conn, pattern, func(keys []string) error {
		var ids []semaphoreID
		for _, key := range keys {
			if id, ok := idOfStateKey(key); ok && !seen[id] {
				seen[id] = true
				ids = append(ids, id)
			}
		}
		for batch := range slices.Chunk(ids, surveyBatch) {
			some, err := s.readStates(ctx, conn, batch)
			states = append(states, some...)
			if err := spoilt.add(err); err != nil {
				return err
			}
		}
		return nil
	})
	return states, cmp.Or(err, spoilt.orNil())
}

// eachKey finds the keys that match a pattern, some at a time.
func eachKey(ctx context.Context, conn redis.Conn, pattern string, visit func(keys []string) error) error {
	for cursor := "0"; ; {
		reply, err := redis.Values(redis.DoContext(conn, ctx, "SCAN", cursor, "MATCH", pattern, "COUNT", scanCount))
		var keys []string
		if err == nil {
			_, err = redis.Scan(reply, &cursor, &keys)
		}
		if err == nil {
			err = visit(keys)
		}
		if err != nil || cursor == "0" {
			return err
		}
	}
}

// idOfStateKey parses the semaphore of a state key. ok is false unless pods can have it:
// that leaves out those of checkID.
func idOfStateKey(key string) (id semaphoreID, ok bool) {
	name, ok := strings.CutPrefix(key, "state/{")
	name, ok2 := strings.CutSuffix(name, "}")
	id.namespace, id.key, _ = strings.Cut(name, "/")
	return id, ok && ok2 && id.namespace != "" && id.namespace != checkID(0).namespace && id.key != ""
}

// readStates reads semaphores in three round trips. It leaves out a semaphore that is
// moving to another node of a Cluster. If it cannot read some, its error is serverErrors.
func (s *semaphores) readStates(ctx context.Context, conn redis.Conn,
	ids []semaphoreID) (states []semaphoreState, err error) {
	now, err := redisTime(ctx, conn)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		err = errors.Join(err, conn.Send("HMGET", append([]any{id.stateKey()}, anySlice(stateFields)...)...),
			conn.Send("ZRANGE", id.waitersKey(), 0, 0))
	}
	states, err = readEach(ctx, conn, err, ids, 2, func(id semaphoreID, replies []any) (semaphoreState, error) {
		st, err := s.readState(id, now, replies[0])
		first, wrong := redis.Strings(replies[1], nil)
		st.first = strings.Join(first, "")
		return st, errors.Join(err, wrong)
	})
	var spoilt spoiltErrors
	if err := spoilt.add(err); err != nil {
		return nil, err
	}
	err = nil
	for _, st := range states {
		id := st.id
		late, stale := now-st.lateAfter().Seconds(), now-st.staleAfter().Seconds()
		err = errors.Join(err,
			conn.Send("LLEN", id.queueKey()),
			conn.Send("ZCARD", id.inflightKey()),
			conn.Send("ZCOUNT", id.inflightKey(), "-inf", exclusive(late)),
			conn.Send("ZCOUNT", id.inflightKey(), "-inf", exclusive(stale)),
			conn.Send("ZRANGE", id.inflightKey(), 0, 0, "WITHSCORES"),
			conn.Send("ZCARD", id.waitersKey()),
			conn.Send("ZRANGE", id.waitersKey(), 0, 0, "WITHSCORES"),
			conn.Send("HMGET", id.namesKey(), st.first+aheadSuffix),
			conn.Send("ZCOUNT", id.seenKey(), exclusive(now-unheardMost.Seconds()), "+inf"))
	}
	states, err = readEach(ctx, conn, err, states, 9, func(st semaphoreState, replies []any) (semaphoreState, error) {
		err := st.count(now, replies)
		return st, err
	})
	if err := spoilt.add(err); err != nil {
		return nil, err
	}
	return states, spoilt.orNil()
}

// readEach receives the replies to the commands that were sent for some semaphores, a
// number for each. sent is the error of sending them. It leaves out a semaphore that is
// moving; and one that cannot be read, which its error names.
func readEach[T any](ctx context.Context, conn redis.Conn, sent error, some []T, commands int,
	read func(one T, replies []any) (semaphoreState, error)) (states []semaphoreState, err error) {
	if sent != nil || len(some) == 0 {
		return nil, sent
	}
	replies, err := redis.Values(redis.DoContext(conn, ctx, ""))
	if err != nil {
		return nil, err
	}
	var spoilt spoiltErrors
	for i, one := range some {
		st, err := read(one, replies[commands*i:commands*(i+1)])
		var answered redis.Error
		if errors.As(err, &answered) && (isSlotMoving(err) || strings.HasPrefix(answered.Error(), "MOVED ")) {
			continue
		}
		if err != nil {
			spoilt.serverErrors = append(spoilt.serverErrors, fmt.Errorf("%s: %w", st.id, err))
			continue
		}
		states = append(states, st)
	}
	return states, spoilt.orNil()
}

// exclusive formats an exclusive bound of a range of scores.
func exclusive(score float64) string { return fmt.Sprintf("(%.0f", score) }

// redisTime returns the time of a server, in Unix seconds.
func redisTime(ctx context.Context, conn redis.Conn) (float64, error) {
	now, err := redis.Ints(redis.DoContext(conn, ctx, "TIME"))
	if err != nil {
		return 0, err
	}
	if len(now) != 2 {
		return 0, fmt.Errorf("unexpected answer to TIME: %v", now)
	}
	return float64(now[0]) + float64(now[1])/1e6, nil
}

// scriptOverrideMost is the bound of an override that the scripts believe; see
// overrideMost in semaphore.lua.
const scriptOverrideMost = mostOverride + 24*time.Hour

// stateFields are the fields of the state that readState reads.
var stateFields = []string{"length", "reclaimed", "rejoined", "interval", "threshold", "touched",
	"limit", "override", "ends", "note", "by", "kept", "created", "gaveUp", "ranBeyond", "overtake", "holds"}

// readState parses the state of a semaphore.
func (s *semaphores) readState(id semaphoreID, now float64, reply any) (semaphoreState, error) {
	st := semaphoreState{id: id}
	fields, err := redis.Values(reply, nil)
	if err == nil && len(fields) != len(stateFields) {
		err = fmt.Errorf("%d fields of the state, not %d", len(fields), len(stateFields))
	}
	if err != nil {
		return st, err
	}
	text := func(name string) string {
		text, _ := redis.String(fields[slices.Index(stateFields, name)], nil)
		return text
	}
	number := func(name string) int { // 0 if it is none: the namespace's user may have written anything
		n, _ := parseDigits(text(name))
		return n
	}
	st.length, st.reclaimed, st.rejoined = number("length"), number("reclaimed"), number("rejoined")
	st.gaveUp, st.ranBeyond, st.holds = number("gaveUp"), number("ranBeyond"), parseHolds(text("holds"))
	st.touched, st.created = float64(number("touched")), time.Unix(int64(number("created")), 0)
	own := s.timing()
	st.timing = timing{max(own.interval, time.Duration(number("interval"))*time.Second),
		max(own.threshold, time.Duration(number("threshold"))*time.Second)}
	if limit, err := redis.Bytes(fields[slices.Index(stateFields, "limit")], nil); err == nil {
		st.setting.limit = readLimit(limit)
		st.setting.limit.overtake = number("overtake")
	}
	length, hasLength := parseDigits(text("override"))
	ends := number("ends")
	if left := float64(ends) - now; hasLength && left > 0 && left <= scriptOverrideMost.Seconds() {
		st.setting.override = override{length, time.Unix(int64(ends), 0), text("note"), text("by")}
		st.kept = since(float64(ends), now)
	}
	st.kept = max(st.kept, since(float64(number("kept")), now))
	return st, nil
}

// readLimit parses the limit in the state. As for the scripts, there is none unless it is
// a number.
func readLimit(text []byte) limit {
	if n, ok := parseDigits(string(text)); ok {
		return limit{known: true, length: n}
	}
	return limit{known: true, length: -1}
}

// count parses the replies to the commands of readStates about holders and waiters.
func (st *semaphoreState) count(now float64, replies []any) error {
	for _, r := range replies {
		if err, ok := r.(redis.Error); ok {
			return err
		}
	}
	var oldest, first, ahead []any
	var inLine int
	_, err := redis.Scan(replies, &st.free, &st.inUse, &st.late, &st.stale, &oldest, &inLine, &first, &ahead, &st.waiting)
	quiet := since(now, st.touched) > max(unheardMost, st.staleAfter())
	if left := st.inUse + inLine; left > 0 && quiet && st.inUse == st.stale && st.waiting == 0 {
		st.abandoned = true
		st.inUse, st.late, st.stale = 0, 0, 0
	}
	if err == nil && st.inUse > 0 {
		st.oldestHeartbeat, err = age(now, oldest)
	}
	if texts, _ := redis.Strings(slices.Concat(first, ahead), nil); st.waiting > 0 && len(texts) == 3 && texts[0] == st.first {
		place, _ := strconv.ParseFloat(texts[1], 64)
		st.longestWait = since(now, (place+readAhead(texts[2]))/1e6)
	}
	return err
}

// expireAbandoned shortens the time to live of abandoned semaphores. Their holders and
// waiters are gone, or were cut off from Redis for longer than the threshold. If a holder
// or waiter comes back before the end, the semaphore keeps all. If it comes later, that is
// as after a loss of data. A semaphore stays as long as what the owner has set.
func (s *semaphores) expireAbandoned(ctx context.Context, states []semaphoreState) error {
	for _, st := range states {
		if !st.abandoned {
			continue
		}
		keys := slices.DeleteFunc(st.id.keys(), func(key any) bool { // what the owner has set stays, and the history
			return key == st.id.historyKey() || key == st.id.stateKey() && st.kept > 0
		})
		server, err := s.queue.find(ctx, st.id)
		if err != nil {
			return err
		}
		set, err := expireKeys(ctx, server, keys, max(abandonedLife, st.staleAfter()))
		if err != nil {
			return fmt.Errorf("%s: %w", server, err)
		}
		if set {
			s.log.Info("the semaphore is abandoned, and expires", "namespace", st.id.namespace, "key", st.id.key)
		}
	}
	return nil
}

// expireKeys shortens the time to live of keys. set reports whether that of one was longer.
func expireKeys(ctx context.Context, server *queueServer, keys []any, life time.Duration) (set bool, err error) {
	conn, err := server.pool.GetContext(ctx)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	for _, key := range keys {
		err = errors.Join(err, conn.Send("EXPIRE", key, seconds(life), "LT"))
	}
	if err != nil {
		return false, err
	}
	replies, err := redis.Ints(redis.DoContext(conn, ctx, ""))
	return slices.Contains(replies, 1), err
}

// age returns the age of the only member of a range, by its score in seconds; zero if the
// range is empty.
func age(now float64, memberAndScore []any) (time.Duration, error) {
	if len(memberAndScore) != 2 {
		return 0, nil
	}
	score, err := redis.Float64(memberAndScore[1], nil)
	return since(now, score), err
}

// since returns how long ago a time was; zero if it is in the future, because the clock
// was set back.
func since(now, then float64) time.Duration {
	return max(0, time.Duration((now-then)*float64(time.Second)))
}

// noteReadError reports a failed read to the queue, so that the next read finds the
// server that took over.
func (s *semaphores) noteReadError(server *queueServer, id semaphoreID, err error) {
	if err != nil && (canRetry(err) || isUnreachable(err)) {
		s.queue.failed(server, id, err)
	}
}

// tokenState is the state of a pod with tokens, or of a waiter.
type tokenState struct {
	token     string
	tokens    int           // that it has, or needs
	pod, node string        // empty if unknown
	held      time.Duration // or waited; heldUnknown if unknown
	idle      time.Duration // since its last heartbeat, or since its last request
	length    int           // of a waiter
	place     float64       // of a waiter: what orders the line, in Unix microseconds
	ahead     time.Duration // of a waiter: its place is so much before its arrival
	ends      waitEnd       // of a waiter
	startsIn  time.Duration // of a waiter: an estimate; startUnknown if too little is known
	stale     bool          // of a token in use
}

func (t tokenState) name() string { return cmp.Or(t.pod, t.token) }

// left returns the time until a waiter's wait ends, if it does.
func (t tokenState) left() (left time.Duration, ok bool) {
	return max(0, t.ends.after-t.held), t.ends.after > 0
}

// started reports whether a sidecar has confirmed the token of a holder: only a sidecar
// knows its node. It is true if the pod is unknown.
func (t tokenState) started() bool { return t.pod == "" || t.node != "" }

// semaphoreDetail is a semaphore with its holders, the longest first, and its line.
type semaphoreDetail struct {
	semaphoreState
	holders, line []tokenState // at most as many of each as were asked for
}

// inspect reads a semaphore, and the most of its holders and waiters that are given. Redis
// forgets a semaphore that no pod has used for minutes: then all is zero.
func (s *semaphores) inspect(ctx context.Context, id semaphoreID, most int) (d semaphoreDetail, err error) {
	err = s.read(ctx, id, func(conn redis.Conn) error {
		states, err := s.readStates(ctx, conn, []semaphoreID{id})
		if err == nil && len(states) == 0 {
			err = errors.New("it is moving to another node of the Cluster: try again")
		}
		if err == nil {
			d.semaphoreState = states[0]
			err = s.readTokens(ctx, conn, &d, most)
		}
		return err
	})
	return d, err
}

// read reads something of a semaphore from its server.
func (s *semaphores) read(ctx context.Context, id semaphoreID, read func(redis.Conn) error) error {
	server, err := s.queue.find(ctx, id)
	if err != nil {
		return err
	}
	conn, err := server.pool.GetContext(ctx)
	if err == nil {
		defer conn.Close()
		err = read(conn)
	} else {
		err = fmt.Errorf("connect: %w", err)
	}
	s.noteReadError(server, id, err)
	if err != nil {
		return fmt.Errorf("%s: %w", server, err)
	}
	return nil
}

// endedByHand is what the scripts call an end by "status release"; see endings.
const endedByHand = "byHand"

// endings are the ways in which the time of a pod ends, with tokens or in line, as the scripts
// name them; and in words.
var endings = map[string]string{
	"released":  "released",
	"reclaimed": "reclaimed", // it was stale
	endedByHand: "by hand",
	"left":      "left the line",
	"lost":      "lost", // in line, it asked no more
	"gaveUp":    "gave up",
}

// ending is how the time of a pod ended.
type ending struct {
	at           time.Time     // by Redis's clock
	ago          time.Duration // since then
	how          string        // one of endings
	waited, held time.Duration // held is heldUnknown if it had no tokens, or if that is not known
	tokens       int           // that it had, or needed
	pod, node    string        // empty if unknown
}

// historyMost is how many endings Redis keeps of a semaphore at least; see semaphore.lua.
const historyMost = 100

// history reads how the time of the last pods of a semaphore ended, the last one first.
func (s *semaphores) history(ctx context.Context, id semaphoreID) (all []ending, err error) {
	err = s.read(ctx, id, func(conn redis.Conn) error {
		now, err := redisTime(ctx, conn)
		if err != nil {
			return err
		}
		texts, err := redis.Strings(redis.DoContext(conn, ctx, "LRANGE", id.historyKey(), -historyMost, -1))
		for _, text := range slices.Backward(texts) {
			if e, ok := parseEnding(text, now); ok {
				all = append(all, e)
			}
		}
		return err
	})
	return all, err
}

// parseEnding parses an entry of the history; see noteEnd in semaphore.lua. ok is false if it
// is none: the namespace's user may have written anything.
func parseEnding(text string, now float64) (e ending, ok bool) {
	words := append(strings.Split(text, " "), "")
	if len(words) < 7 || endings[words[1]] == "" {
		return e, false
	}
	var n [4]int
	for i, word := range []string{words[0], words[2], words[4], strings.TrimPrefix(words[3], "-")} {
		if n[i], ok = parseDigits(word); !ok {
			return e, false
		}
	}
	e = ending{at: time.Unix(int64(n[0]), 0), ago: since(now, float64(n[0])), how: words[1], waited: time.Duration(n[1]) * time.Second, tokens: n[2],
		held: time.Duration(n[3]) * time.Second}
	if strings.HasPrefix(words[3], "-") {
		e.held = heldUnknown
	}
	if isPodName(words[5]) {
		e.pod = words[5]
	}
	if isObjectName(words[6]) {
		e.node = words[6]
	}
	return e, true
}

// readTokens reads the holders and the line.
func (s *semaphores) readTokens(ctx context.Context, conn redis.Conn, d *semaphoreDetail, most int) error {
	now, err := redisTime(ctx, conn)
	if err != nil {
		return err
	}
	for _, key := range []string{d.id.inflightKey(), d.id.waitersKey()} {
		err = errors.Join(err, conn.Send("ZRANGE", key, 0, most-1, "WITHSCORES"))
	}
	if err != nil {
		return err
	}
	replies, err := redis.Values(redis.DoContext(conn, ctx, ""))
	if err != nil {
		return err
	}
	beats, err := redis.Float64Map(replies[0], nil)
	if err != nil {
		return err
	}
	arrivals, err := redis.Float64Map(replies[1], nil)
	if err != nil {
		return err
	}
	if d.abandoned {
		return nil
	}
	tokens := map[string]int{} // that each pod has: its others begin with the name of the first
	for name, at := range beats {
		token, _, isMore := strings.Cut(name, "/")
		if tokens[token]++; !isMore {
			idle := since(now, at)
			d.holders = append(d.holders, tokenState{token: token, held: heldUnknown, idle: idle,
				stale: idle > d.staleAfter()})
		}
	}
	for i := range d.holders {
		d.holders[i].tokens = tokens[d.holders[i].token]
	}
	for token, at := range arrivals {
		d.line = append(d.line, tokenState{token: token, place: at})
	}
	err = errors.Join(readHolders(ctx, conn, d.id, now, d.holders), readLine(ctx, conn, d.id, now, d.line))
	d.line = slices.DeleteFunc(d.line, func(w tokenState) bool { return w.idle > unheardMost })
	byAge := func(a, b tokenState) int { return cmp.Or(cmp.Compare(b.held, a.held), cmp.Compare(a.token, b.token)) }
	slices.SortFunc(d.holders, byAge)
	slices.SortFunc(d.line, func(a, b tokenState) int {
		return cmp.Or(cmp.Compare(a.place, b.place), cmp.Compare(a.token, b.token))
	})
	d.estimate()
	return err
}

// startUnknown marks a waiter whose start nobody can estimate.
const startUnknown = -time.Second

// forecast says when the tokens come free.
func (d *semaphoreDetail) forecast() forecast {
	var known usedTokens
	for _, h := range d.holders {
		known.add(h.held, h.tokens)
	}
	return d.holds.forecast(known, d.inUse)
}

// estimate estimates when each waiter starts.
func (d *semaphoreDetail) estimate() {
	f, before := d.forecast(), 0
	for i := range d.line {
		w := &d.line[i]
		w.startsIn = startUnknown
		length := d.setting.lengthFor(max(d.length, w.length))
		if w.tokens > length { // others pass it
			continue
		}
		before += w.tokens
		if wait, ok := f.freeIn(length, before); ok {
			w.startsIn = wait
		}
	}
}

// readHolders adds the pod of each token, and since when the pod holds it.
func readHolders(ctx context.Context, conn redis.Conn, id semaphoreID, now float64, holders []tokenState) error {
	texts, err := readNames(ctx, conn, id, holders, "/pod")
	for i, text := range texts {
		h := &holders[i]
		var at float64
		if h.pod, h.node, at, _ = parseName(text); h.pod != "" {
			h.held = since(now, at)
		}
	}
	return err
}

// readLine adds the pod of each waiter, its length, and when it asked last.
func readLine(ctx context.Context, conn redis.Conn, id semaphoreID, now float64, line []tokenState) error {
	if len(line) == 0 {
		return nil
	}
	texts, err := readNames(ctx, conn, id, line, "/pod")
	if err != nil {
		return err
	}
	lengths, err := readNames(ctx, conn, id, line, "")
	if err != nil {
		return err
	}
	aheads, err := readNames(ctx, conn, id, line, aheadSuffix)
	if err != nil {
		return err
	}
	for i := range line {
		w := &line[i]
		w.pod, w.node, _, w.ends = parseName(texts[i])
		w.length, w.tokens = parseWish(lengths[i]) // empty if it has left meanwhile
		ahead := readAhead(aheads[i])
		w.ahead, w.held = time.Duration(ahead)*time.Microsecond, since(now, (w.place+ahead)/1e6)
		err = errors.Join(err, conn.Send("ZSCORE", id.seenKey(), w.token))
	}
	if err != nil {
		return err
	}
	asked, err := redis.Values(redis.DoContext(conn, ctx, ""))
	for i, reply := range asked {
		if at, err := redis.Float64(reply, nil); err == nil {
			line[i].idle = since(now, at)
		}
	}
	return err
}

// readNames reads one field for each token from the hash of names; empty where there is
// none.
func readNames(ctx context.Context, conn redis.Conn, id semaphoreID, tokens []tokenState,
	suffix string) ([]string, error) {
	if len(tokens) == 0 {
		return nil, nil
	}
	fields := []any{id.namesKey()}
	for _, t := range tokens {
		fields = append(fields, t.token+suffix)
	}
	return redis.Strings(redis.DoContext(conn, ctx, "HMGET", fields...))
}

// aheadSuffix ends the name of a waiter's head start in the hash of names.
const aheadSuffix = "/ahead"

// readAhead parses a head start, in microseconds: 0 if there is none, or none that a
// script wrote.
func readAhead(text string) float64 {
	n, _ := parseDigits(text)
	return float64(n)
}

// parseName parses what the scripts store of a pod; see semaphore.lua.
func parseName(text string) (pod, node string, since float64, ends waitEnd) {
	at, name, _ := strings.Cut(text, " ")
	pod, name, _ = strings.Cut(name, " ")
	node, name, _ = strings.Cut(name, " ")
	wait, then, _ := strings.Cut(name, " ")
	at, _, _ = strings.Cut(at, "+") // how long it had waited
	since, err := strconv.ParseFloat(at, 64)
	if err != nil || newPodName(pod, node) == "" {
		return "", "", 0, waitEnd{}
	}
	if n, ok := parseDigits(wait); ok {
		ends = waitEnd{time.Duration(n) * time.Second, then}
	}
	return pod, node, since, ends
}

const (
	// surveyTimeout bounds the survey of a scrape, which the other metrics wait for.
	surveyTimeout = 2 * time.Second

	// surveyFresh is how long scrapes share a survey.
	surveyFresh = time.Second

	// mostMeasured caps the semaphores that have metrics. The others have no line and the
	// fewest tokens in use.
	mostMeasured = 1000
)

// semaphoreGauge is a metric of each semaphore.
type semaphoreGauge struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(semaphoreState) float64
	has   func(semaphoreState) bool // nil: all semaphores have the metric
}

func gauge(name, help string, value func(semaphoreState) float64) semaphoreGauge {
	return newSemaphoreGauge(name, help, nil, prometheus.GaugeValue, value)
}

func counter(name, help string, value func(semaphoreState) float64) semaphoreGauge {
	return newSemaphoreGauge(name, help, nil, prometheus.CounterValue, value)
}

// leftCounter counts the pods whose time in line was over, and that did then what reason says.
func leftCounter(reason string, value func(semaphoreState) float64) semaphoreGauge {
	return newSemaphoreGauge("left_total", "Pods of the semaphore whose time in line was over: "+
		"they failed, or run with a token beyond the length.",
		prometheus.Labels{"reason": reason}, prometheus.CounterValue, value)
}

func newSemaphoreGauge(name, help string, labels prometheus.Labels, kind prometheus.ValueType,
	value func(semaphoreState) float64) semaphoreGauge {
	desc := prometheus.NewDesc(metricsPrefix+name, help, []string{"namespace", "key"}, labels)
	return semaphoreGauge{desc: desc, kind: kind, value: value}
}

// only limits a metric to the semaphores that have it.
func (g semaphoreGauge) only(has func(semaphoreState) bool) semaphoreGauge {
	g.has = has
	return g
}

// isSet reports whether a length is set that counts for all pods.
func (s setting) isSet() bool { return !s.override.until.IsZero() || s.limit.isSet() }

var semaphoreGauges = []semaphoreGauge{
	gauge("length", "Greatest length that pods of the semaphore asked for lately.",
		func(s semaphoreState) float64 { return float64(s.length) }),
	gauge("limit", "Length in force that the owner of the resource has set; missing if none is set.",
		func(s semaphoreState) float64 { return float64(s.setting.lengthFor(s.length)) }).
		only(func(s semaphoreState) bool { return s.setting.isSet() }),
	gauge("paused", "1 while the length that the owner has set is 0, else 0.",
		func(s semaphoreState) float64 {
			if s.setting.isSet() && s.setting.lengthFor(s.length) == 0 {
				return 1
			}
			return 0
		}),
	gauge("queue", "Free tokens of the semaphore.",
		func(s semaphoreState) float64 { return float64(s.free) }),
	gauge("inflight", "Tokens of the semaphore in use.",
		func(s semaphoreState) float64 { return float64(s.inUse) }),
	gauge("late", "Tokens in use that have missed a heartbeat, with the stale ones.",
		func(s semaphoreState) float64 { return float64(s.late) }),
	gauge("stale", "Tokens in use without a heartbeat for the stale threshold.",
		func(s semaphoreState) float64 { return float64(s.stale) }),
	gauge("waiters", "Pods that wait in the semaphore's line.",
		func(s semaphoreState) float64 { return float64(s.waiting) }),
	gauge("longest_wait_seconds", "Waiting time of the first pod in line; 0 if the line is empty.",
		func(s semaphoreState) float64 { return s.longestWait.Seconds() }),
	gauge("oldest_heartbeat_seconds", "Time since the oldest heartbeat of a token in use; 0 if there is none.",
		func(s semaphoreState) float64 { return s.oldestHeartbeat.Seconds() }),
	counter("reclaimed_tokens_total", "Stale tokens of the semaphore that were reclaimed, by webhooks and sidecars.",
		func(s semaphoreState) float64 { return float64(s.reclaimed) }),
	counter("rejoined_tokens_total",
		"Tokens of the semaphore that their holders put back: they had been reclaimed, or lost with Redis.",
		func(s semaphoreState) float64 { return float64(s.rejoined) }),
	leftCounter(whenWaitedFail, func(s semaphoreState) float64 { return float64(s.gaveUp) }),
	leftCounter(whenWaitedRun, func(s semaphoreState) float64 { return float64(s.ranBeyond) }),
}

// Metrics of the survey itself.
var (
	surveySuccess = prometheus.NewDesc(metricsPrefix+"survey_success",
		"1 if all semaphores could be read for this scrape.", nil, nil)
	surveyDuration = prometheus.NewDesc(metricsPrefix+"survey_duration_seconds",
		"Time that it took to read the semaphores.", nil, nil)
	semaphoresSeen = prometheus.NewDesc(metricsPrefix+"semaphores",
		"Semaphores that were used in the last minutes, or are in use.", nil, nil)
	semaphoresLeft = prometheus.NewDesc(metricsPrefix+"semaphores_left_out",
		"Semaphores without metrics of their own, as there are too many.", nil, nil)
)

// surveyor reads the semaphores at each scrape. Each webhook exports all of them, so
// values of several webhooks must not be added.
type surveyor struct {
	semaphores *semaphores
	timeout    time.Duration // of a survey
	surveys    flights[struct{}, *surveyResult]
	limit      logLimiter
}

// mostSpoilt bounds what a line of the log says of spoilt semaphores, in bytes.
const mostSpoilt = 1000

// surveyResult is the part of a survey that scrapes export.
type surveyResult struct {
	took  time.Duration
	shown []semaphoreState // those with metrics of their own
	seen  int              // all semaphores
}

func newSurveyor(s *semaphores, timeout time.Duration) *surveyor {
	v := &surveyor{semaphores: s, timeout: timeout}
	v.surveys.keep = surveyFresh
	return v
}

// watchSemaphores registers the metrics of the semaphores. timeout bounds their survey.
func (m *metrics) watchSemaphores(s *semaphores, timeout time.Duration) {
	m.registry.MustRegister(newSurveyor(s, timeout))
}

// Describe implements prometheus.Collector.
func (v *surveyor) Describe(descs chan<- *prometheus.Desc) {
	for _, g := range semaphoreGauges {
		descs <- g.desc
	}
	for _, d := range []*prometheus.Desc{surveySuccess, surveyDuration, semaphoresSeen, semaphoresLeft} {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (v *surveyor) Collect(metrics chan<- prometheus.Metric) {
	survey := v.surveys.join(struct{}{}, new(surveyResult), v.read)
	<-survey.done
	result := survey.state
	for _, st := range result.shown {
		for _, g := range semaphoreGauges {
			if g.has != nil && !g.has(st) {
				continue
			}
			metrics <- prometheus.MustNewConstMetric(g.desc, g.kind, g.value(st), st.id.namespace, st.id.key)
		}
	}
	success := 1.0
	if survey.err != nil {
		success = 0
	}
	for desc, value := range map[*prometheus.Desc]float64{
		surveySuccess:  success,
		surveyDuration: result.took.Seconds(),
		semaphoresSeen: float64(result.seen),
		semaphoresLeft: float64(result.seen - len(result.shown)),
	} {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value)
	}
}

// read reads the semaphores and keeps the busiest.
func (v *surveyor) read(result *surveyResult) error {
	ctx, cancel := context.WithTimeout(context.Background(), v.timeout)
	defer cancel()
	start := time.Now()
	states, err := v.semaphores.survey(ctx, "")
	var spoilt spoiltErrors
	if err = spoilt.add(err); spoilt.orNil() != nil {
		if _, ok := v.limit.allow(); ok {
			v.semaphores.log.Warn("semaphores are spoilt, and have no metrics", "error", truncate(spoilt.Error(), mostSpoilt))
		}
	}
	err = errors.Join(err, v.semaphores.expireAbandoned(ctx, states))
	result.took = time.Since(start)
	states = slices.DeleteFunc(states, func(st semaphoreState) bool { // keys of another program may not even be text
		return st.id.namespace != shared && !isObjectName(st.id.namespace) || checkKey(st.id.key) != ""
	})
	slices.SortStableFunc(states, func(a, b semaphoreState) int {
		return cmp.Or(cmp.Compare(b.waiting, a.waiting), cmp.Compare(b.inUse, a.inUse))
	})
	result.seen = len(states)
	result.shown = slices.Clone(states[:min(len(states), mostMeasured)]) // a clone frees the others
	if err != nil {
		if _, ok := v.limit.allow(); ok {
			v.semaphores.log.Warn("the semaphores cannot be read for the metrics", "error", err.Error())
		}
	}
	return err
}
