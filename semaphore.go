package main

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

// settings are shared by the modes that use semaphores: webhook, sidecar, gate and
// status.
type settings struct {
	lockMode          string
	redisAddresses    []string
	etcdAddresses     []string
	queueRedisAddress queueAddress
	heartbeatInterval time.Duration
	staleThreshold    time.Duration
	unstarted         time.Duration // of the webhook: see acquire; zero for the stale threshold
	redis             redisSettings
	etcd              etcdSettings
}

// newLocker makes the lock of the chosen mode. It keeps up to maxIdle connections to each
// Redis server. If maxIdle is more than one, it looks up the servers' names now: the first
// repair does not wait for DNS.
func newLocker(c settings, maxIdle int) locker {
	addresses := c.redisAddresses
	if c.lockMode == lockModeEtcd {
		addresses = c.etcdAddresses
	}
	if maxIdle > 1 {
		processResolver.prepare(addresses...)
	}
	if c.lockMode == lockModeEtcd {
		return newEtcdLock(c.etcdAddresses, c.etcd)
	}
	return newRedlock(c.redisAddresses, c.redis, maxIdle)
}

//go:embed lua/semaphore.lua
var commonSource string

//go:embed lua/acquire.lua
var acquireSource string

//go:embed lua/maintain.lua
var maintainSource string

//go:embed lua/heartbeat.lua
var heartbeatSource string

//go:embed lua/release.lua
var releaseSource string

//go:embed lua/keep.lua
var keepSource string

//go:embed lua/hold.lua
var holdSource string

//go:embed lua/set.lua
var setSource string

// scriptKeys is the number of keys that each script takes: all keys of a semaphore.
const scriptKeys = 7

var (
	acquireScript   = newScript("acquire", 1, commonSource, acquireSource)
	maintainScript  = newScript("maintain", noToken, commonSource, maintainSource)
	heartbeatScript = newScript("heartbeat", 0, commonSource, heartbeatSource)
	releaseScript   = newScript("release", noToken, commonSource, releaseSource)
	keepScript      = newScript("keep", noToken, commonSource, keepSource)
	holdScript      = newScript("hold", noToken, commonSource, holdSource)
	setScript       = newScript("set", noToken, commonSource, setSource)
)

// script is a Redis script. Its text is built on first use: it takes 25 KB of memory, and
// a sidecar sends two or three scripts.
type script struct {
	name  string
	token int // index of the argument that is a token which the script may put in flight; or noToken
	text  func() string
	made  func() *redis.Script
}

// ownScripts are all scripts of this version.
var ownScripts []*script

const noToken = -1

func newScript(name string, token int, sources ...string) *script {
	text := func() string { return strings.Join(sources, "") }
	s := &script{name, token, text, sync.OnceValue(func() *redis.Script { return redis.NewScript(scriptKeys, text()) })}
	ownScripts = append(ownScripts, s)
	return s
}

// The statuses that the scripts return; see their headers.
const (
	statusLate = -1

	acquireFull   = 0
	acquireTaken  = 1
	acquireRepair = 2
	acquireGaveUp = 3

	heartbeatRejoined = 0

	releaseDone = 1
	releaseLeft = 2

	setDone = 1
)

const (
	// beatTimeout bounds one heartbeat, if the interval is not shorter. holderRetry is the
	// longest wait before a failed heartbeat is sent again. Once Redis answers, live holders
	// beat within beatTimeout. The scripts rely on it; see beatTimeout in semaphore.lua.
	beatTimeout = 3 * time.Second
	holderRetry = time.Second

	// giveBackGrace bounds the time in which a stopping process gives back tokens that no
	// pod will use.
	giveBackGrace = 5 * time.Second

	// idleConnections is the number of idle connections that a webhook or gate keeps to
	// each queue server.
	idleConnections = 64
)

// semaphores are the counting semaphores of a queue.
type semaphores struct {
	address           queueAddress
	queue             tokenServers
	outages           outages
	locks             locker
	heartbeatInterval time.Duration
	staleThreshold    time.Duration
	unstarted         time.Duration // see acquire
	loadsScripts      bool          // see redisSettings
	byHand            bool          // a person releases
	log               *slog.Logger
	metrics           *metrics // nil for a sidecar

	repairs flights[semaphoreID, *repairStage] // by this process
	drops   flights[*queueServer, *int]        // of histories, to make room; with their number

	mu         sync.Mutex
	afterDoubt map[semaphoreID]struct{} // semaphores that repairAfterDoubt works on
	strays     map[string]time.Time     // by token; see noteStray

	releaseLimit logLimiter // of lines about releases that fail

	background sync.WaitGroup // repairs, unlocks and releases
	closing    context.Context
	stop       func() // ends closing
}

func newSemaphores(c settings, locks locker, maxIdle int, log *slog.Logger) *semaphores {
	closing, stop := context.WithCancel(context.Background())
	s := &semaphores{
		address:           c.queueRedisAddress,
		queue:             newTokenServers(c.queueRedisAddress, c.redis, maxIdle, log),
		locks:             locks,
		heartbeatInterval: c.heartbeatInterval,
		staleThreshold:    c.staleThreshold,
		unstarted:         c.unstarted,
		loadsScripts:      c.redis.loadsScripts,
		log:               log,
		afterDoubt:        map[semaphoreID]struct{}{},
		closing:           closing,
		outages:           outages{parts: map[int]outage{}},
		stop:              stop,
		strays:            map[string]time.Time{},
	}
	s.repairs.group = &s.background
	s.drops.keep = time.Second // a full Redis is not scanned all the time
	return s
}

// close waits for background work until ctx is done, then closes all connections.
func (s *semaphores) close(ctx context.Context) error {
	s.stop()
	return errors.Join(s.closeLocks(ctx), s.queue.close())
}

// closeLocks is close, but keeps the connections to the queue Redis. After it, nothing
// can be repaired.
func (s *semaphores) closeLocks(ctx context.Context) error {
	done := make(chan error, 1)
	go func() {
		s.background.Wait()
		done <- s.locks.close()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("tokens may have been left to go stale, and locks to expire: %w", ctx.Err())
	}
}

// timeToLive returns how many seconds the keys of a semaphore with holders or waiters
// outlive their last use.
func (s *semaphores) timeToLive() int {
	return int(max(24*time.Hour, 10*s.staleThreshold) / time.Second)
}

// heartbeat keeps the tokens of a pod in flight. If they had been reclaimed or lost, Redis
// counts them again, and rejoined is true. The heartbeat names the pod, how long it has
// held them, and their number. For takenAs, see heartbeat.lua.
func (s *semaphores) heartbeat(ctx context.Context, id semaphoreID, token, takenAs string, pod podName,
	held time.Duration, tokens int) (rejoined bool, err error) {
	status, _, err := s.run(ctx, heartbeatScript, id, token, pod, seconds(held), takenAs, max(1, tokens))
	if err != nil {
		return false, fmt.Errorf("heartbeat %s: %w", id, err)
	}
	return status == heartbeatRejoined, nil
}

// release gives a token back, or leaves the line. status is releaseDone, releaseLeft, or
// zero if there was nothing to release. For takenAs, see release.lua.
func (s *semaphores) release(ctx context.Context, id semaphoreID, token, takenAs string) (status int, err error) {
	args := []any{token, takenAs}
	if s.byHand {
		args = append(args, endedByHand)
	}
	status, _, err = s.run(ctx, releaseScript, id, args...)
	if err != nil {
		return 0, fmt.Errorf("release %s: %w", id, err)
	}
	return status, nil
}

// releaseWithin releases a token. It retries until that succeeds or ctx is done, and then
// returns the error of the last attempt. A stray command of the token may still count it
// again: after its deadline, releaseWithin releases once more.
func (s *semaphores) releaseWithin(ctx context.Context, id semaphoreID, token, takenAs string) (status int, err error) {
	status, err = s.releaseRetrying(ctx, id, token, takenAs)
	deadline, _ := s.stray(token)
	if wait := time.Until(deadline); err == nil && wait > 0 && sleep(ctx, wait) == nil {
		_, err = s.releaseRetrying(ctx, id, token, takenAs)
	}
	return status, err
}

func (s *semaphores) releaseRetrying(ctx context.Context, id semaphoreID, token, takenAs string) (status int, err error) {
	for retry := newBackoff(50*time.Millisecond, time.Second); ; {
		attempt, cancel := context.WithTimeout(ctx, s.attemptTimeout())
		status, err = s.release(attempt, id, token, takenAs)
		cancel()
		if err == nil {
			return status, nil
		}
		if sleep(ctx, retry.next()) != nil {
			return 0, err
		}
		if errors.Is(err, errTooMany) { // those before it log why they take so long
			continue
		}
		if dropped, ok := s.releaseLimit.allow(); ok {
			s.log.Warn("release failed, to be retried", "namespace", id.namespace, "key", id.key, "token", token,
				"error", err.Error(), "notLoggedBefore", dropped)
		}
	}
}

// giveBack releases a token that no pod will use. It retries until the token is stale
// anyway.
func (s *semaphores) giveBack(id semaphoreID, token string) {
	ctx, cancel := context.WithTimeout(context.Background(), s.staleThreshold)
	defer cancel()
	status, err := s.releaseWithin(ctx, id, token, "")
	log := s.log.With("namespace", id.namespace, "key", id.key, "token", token)
	switch {
	case err != nil:
		log.Error("unused token left to go stale", "staleThreshold", s.staleThreshold.String(),
			"error", err.Error())
	case status == releaseDone:
		log.Info("unused token given back")
	}
}

// giveBackLater runs giveBack in the background; close waits for it.
func (s *semaphores) giveBackLater(id semaphoreID, token string) {
	s.background.Go(func() { s.giveBack(id, token) })
}

// refreshMost caps the places, or tokens, of one command: so many take Redis about two
// milliseconds.
const refreshMost = 250

// placeRequest is the place in line of one pod.
type placeRequest struct {
	token   string
	arrival int64 // Unix microseconds: orders the line, less ahead
	ahead   int64 // microseconds: its head start
	length  int
	tokens  int
	pod     podName
	ends    waitEnd
}

// placesReply is the state of a line after its places were refreshed.
type placesReply struct {
	created int64          // Unix seconds at which Redis first knew the semaphore; goes into the next request
	served  []string       // waiters, also of other processes, that a token is free for
	held    []string       // tokens that are in flight already
	joined  map[string]int // tokens that were not in line, and their new positions
	occupancy
}

// refreshPlaces keeps the places of pods in a semaphore's line, and adds those that are
// missing. It removes the tokens in gone from the line. known is created of the last
// reply, or zero. With an error, part of the work may be done.
func (s *semaphores) refreshPlaces(ctx context.Context, id semaphoreID, known int64, gone []string,
	pods []placeRequest) (all placesReply, err error) {
	all = placesReply{created: known, joined: map[string]int{}}
	for len(gone)+len(pods) > 0 {
		leaving := gone[:min(len(gone), refreshMost)]
		staying := pods[:min(len(pods), refreshMost-len(leaving))]
		gone, pods = gone[len(leaving):], pods[len(staying):]
		args := append([]any{all.created, len(leaving)}, anySlice(leaving)...)
		for _, p := range staying {
			args = append(args, p.token, p.arrival, wish(p.length, p.tokens), p.pod.waiting(p.ends), p.ahead)
		}
		_, rest, err := s.run(ctx, keepScript, id, args...)
		if err != nil {
			return all, fmt.Errorf("keep the line of %s: %w", id, err)
		}
		var served, held []string
		var joined []any
		rest, err = redis.Scan(rest, &all.created, &served, &held, &joined)
		if err == nil {
			all.occupancy, _, err = parseOccupancy(rest)
		}
		for ; err == nil && len(joined) >= 2; joined = joined[2:] {
			var token string
			var position int
			_, err = redis.Scan(joined, &token, &position)
			all.joined[token] = position
		}
		if err != nil {
			return all, fmt.Errorf("keep the line of %s: unexpected answer of queue Redis %s: %w", id, s.address, err)
		}
		all.served, all.held = served, append(all.held, held...)
	}
	return all, nil
}

// heldTokens are the tokens of one pod that holds them.
type heldTokens struct {
	token string
	n     int
}

// refreshTokens keeps the tokens of pods in flight. It returns those that are not in
// flight, and does not put them back.
func (s *semaphores) refreshTokens(ctx context.Context, id semaphoreID, pods []heldTokens) (lost []string, err error) {
	for chunk := range slices.Chunk(pods, refreshMost) {
		var args []any
		for _, h := range chunk {
			args = append(args, h.token, max(1, h.n))
		}
		_, rest, err := s.run(ctx, holdScript, id, args...)
		if err != nil {
			return lost, fmt.Errorf("hold tokens of %s: %w", id, err)
		}
		var some []string
		if _, err := redis.Scan(rest, &some); err != nil {
			return lost, fmt.Errorf("hold tokens of %s: unexpected answer of queue Redis %s: %w",
				id, s.address, err)
		}
		lost = append(lost, some...)
	}
	return lost, nil
}

// setting is the length of a semaphore that the owner of the resource has set. It counts
// for all pods, whatever they ask for. Zero is: nothing is set.
type setting struct {
	limit    limit
	override override
}

// limit is the length that the settings of semaphores say. Zero is: not known, as Redis
// may have lost it.
type limit struct {
	known    bool
	length   int // 0: paused; less: there is none
	overtake int // seconds for which others may pass a waiter that needs several tokens and does not fit
}

// isSet reports whether there is a limit.
func (l limit) isSet() bool { return l.known && l.length >= 0 }

// String returns the limit as the scripts take it.
func (l limit) String() string {
	if !l.isSet() {
		return ""
	}
	return strconv.Itoa(l.length)
}

// override is a length for a time. It precedes the limit.
type override struct {
	length int       // 0: paused
	until  time.Time // zero: there is none
	note   string    // why
	by     string    // who; only in a survey
}

// in reports whether the override is in force, by a clock.
func (o override) in(now time.Time) bool { return now.Before(o.until) }

// lengthFor returns the length that counts for a pod that asks for another.
func (s setting) lengthFor(length int) int {
	switch {
	case !s.override.until.IsZero():
		return s.override.length
	case s.limit.isSet():
		return s.limit.length
	}
	return length
}

// learn notes what a reply of Redis says. It keeps a limit that Redis may have lost.
func (s *setting) learn(reply setting) {
	s.override = reply.override
	if reply.limit.known {
		s.limit = reply.limit
	}
}

// text says what is set, for a refusal or a waiter; empty if nothing of note is.
func (s setting) text() string {
	o := s.override
	var text string
	switch {
	case o.until.IsZero() && s.limit.isSet() && s.limit.length == 0:
		return "paused by the ConfigMap semaphores"
	case o.until.IsZero():
		return ""
	case o.length == 0:
		text = "paused until " + clockTime(o.until)
	default:
		text = fmt.Sprintf("set to %d until %s", o.length, clockTime(o.until))
	}
	if o.note != "" {
		text += ": " + displayNote(o.note)
	}
	return text
}

// inUse says how many tokens are in use, of how many, and what is set: "1 of 3 in use".
// pods is the number of pods that have them, if some have several, or else 0.
func (s setting) inUse(inUse, length, pods int) string {
	text, of, used := s.text(), s.lengthFor(length), "in use"
	if pods > 0 {
		used = "tokens in use" + byPods(pods)
	}
	switch {
	case text == "":
		return fmt.Sprintf("%d of %d %s", inUse, of, used)
	case of == 0:
		return fmt.Sprintf("%s; %d %s", text, inUse, used)
	}
	return fmt.Sprintf("%d of %d %s (%s)", inUse, of, used, text)
}

// byPods says how many pods have the tokens in use, if that is known.
func byPods(pods int) string {
	switch pods {
	case 0:
		return ""
	case 1:
		return " by 1 pod"
	}
	return fmt.Sprintf(" by %d pods", pods)
}

// parseSetting parses what the scripts return of the setting; see setting in
// semaphore.lua.
func parseSetting(list []any) (s setting, err error) {
	const unknown = -2
	if len(list) > 0 {
		list, err = redis.Scan(list, &s.limit.length)
		s.limit.known = s.limit.length != unknown
	}
	if err == nil && len(list) > 0 {
		var ends int64
		_, err = redis.Scan(list, &s.override.length, &ends, &s.override.note)
		s.override.until = time.Unix(ends, 0)
	}
	return s, err
}

const (
	// mostNote bounds the note of an override, in bytes.
	mostNote = 200

	// The shortest and longest override: a forgotten one ends by itself.
	leastOverride, mostOverride = time.Minute, 7 * 24 * time.Hour
)

// displayNote is a note that is safe to show: see displayName.
func displayNote(note string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, truncate(note, mostNote))
}

// setLimit sets the limit of a semaphore; unlessKnown, only if Redis knows none. The keys
// live for life at least.
func (s *semaphores) setLimit(ctx context.Context, id semaphoreID, l limit, life time.Duration, unlessKnown bool) error {
	what := "limit"
	if unlessKnown {
		what = "default"
	}
	_, _, err := s.run(ctx, setScript, id, what, l.String(), seconds(life), "", "", l.overtake)
	if err != nil {
		return fmt.Errorf("set %s: %w", id, err)
	}
	return nil
}

// limitLife is how long the keys of a semaphore live at least whose name is in the
// owners' settings. keepLimits renews it.
const limitLife = 24 * time.Hour

// limitOf returns what the owners' settings say of a semaphore.
func limitOf(o ownerSettings, id semaphoreID) limit {
	line, ok := o.lineOf(id.namespace, id.key)
	if !ok {
		line.length = -1
	}
	return limit{known: true, length: line.length, overtake: line.overtake}
}

// keepLimits makes Redis know the limits of the semaphores that a survey has found, and
// of those that the settings name. It replaces a limit that Redis knows only if
// mayReplace. failed are those that it could not set.
func (s *semaphores) keepLimits(ctx context.Context, states []semaphoreState, o ownerSettings,
	mayReplace func(semaphoreID) bool) (failed map[semaphoreID]bool, err error) {
	failed = map[semaphoreID]bool{}
	var errs serverErrors
	keep := func(id semaphoreID, life time.Duration, replaces bool) {
		if failed[id] = true; ctx.Err() != nil && len(errs) > 0 {
			return
		}
		if err := s.setLimit(ctx, id, limitOf(o, id), life, !replaces); err != nil {
			errs = append(errs, err)
		} else {
			delete(failed, id)
		}
	}
	named := map[semaphoreID]time.Duration{} // how long they live at least; those that are left are missing
	for _, name := range o.named() {
		namespace, key, _ := strings.Cut(name, "/")
		named[semaphoreID{namespace, key}] = limitLife
	}
	var unset []semaphoreID
	for _, st := range states {
		life, want, have := named[st.id], limitOf(o, st.id), st.setting.limit
		delete(named, st.id)
		switch {
		case have == want && st.kept >= life/2, !have.known && !want.isSet():
		case have.known && have.length == want.length, !have.known:
			keep(st.id, life, false)
		case !mayReplace(st.id):
		case want.isSet():
			keep(st.id, life, true)
		default: // last: the users of namespaces can make many of them
			unset = append(unset, st.id)
		}
	}
	for id, life := range named {
		keep(id, life, false)
	}
	for _, id := range unset {
		keep(id, 0, true)
	}
	if len(errs) > 0 {
		return failed, errs
	}
	return nil, nil
}

// setOverride sets another length of a semaphore for a time. It returns the numbers of
// tokens in use and of waiters.
func (s *semaphores) setOverride(ctx context.Context, id semaphoreID, o override, lasts time.Duration) (
	inUse, waiting int, err error) {
	return s.changeOverride(ctx, id, strconv.Itoa(o.length), seconds(lasts), o.note, o.by)
}

// clearOverride ends the override of a semaphore. It returns what setOverride does.
func (s *semaphores) clearOverride(ctx context.Context, id semaphoreID) (inUse, waiting int, err error) {
	return s.changeOverride(ctx, id, "", 0, "", "")
}

// moveFirst moves a waiter to the front of the line. ok is false if it is not in line.
func (s *semaphores) moveFirst(ctx context.Context, id semaphoreID, token string) (ok bool, err error) {
	status, _, err := s.run(ctx, setScript, id, "first", token, 0, "", "")
	return status == setDone, err
}

func (s *semaphores) changeOverride(ctx context.Context, id semaphoreID, args ...any) (inUse, waiting int, err error) {
	_, rest, err := s.run(ctx, setScript, id, append([]any{"override"}, args...)...)
	if err == nil {
		_, err = redis.Scan(rest, &inUse, &waiting)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("set %s: %w", id, err)
	}
	return inUse, waiting, nil
}

// podName returns the name of a pod for a semaphore: with its namespace if that is not
// the semaphore's.
func (id semaphoreID) podName(namespace, name string) string {
	if id.namespace == shared && namespace != "" && name != "" {
		return namespace + "/" + name
	}
	return name
}

// podName is the pod of a token, for people, as "NAME NODE". NAME is the pod's name, or
// the generateName from which the API server makes one. NODE is empty until it is known.
// An unknown pod is empty.
type podName string

func newPodName(name, node string) podName {
	if !isPodName(name) {
		return ""
	}
	if !isObjectName(node) {
		node = ""
	}
	return podName(name + " " + node)
}

// waiting returns what Redis keeps of a pod in line; see names in semaphore.lua.
func (p podName) waiting(e waitEnd) string {
	text := string(p)
	if p != "" && e.after > 0 {
		text += " " + strconv.Itoa(seconds(e.after))
	}
	if p != "" && e.runs() {
		text += " " + whenWaitedRun
	}
	return text
}

// isPodName reports whether a name is that of a pod, with or without its namespace.
func isPodName(name string) bool {
	namespace, rest, found := strings.Cut(name, "/")
	return isObjectName(namespace) && (!found || isObjectName(rest))
}

// holder is a pod that has a token.
type holder struct {
	name      string // of the pod, or the token if that is unknown
	held      time.Duration
	unstarted bool // no sidecar has confirmed the token; false if the pod is unknown
	tokens    int  // that it has
}

// heldUnknown marks a holder that has not reported how long it has held its token.
const heldUnknown = -time.Second

// parseHolders parses the holders in a reply of the acquire script. The longest holder
// comes first.
func parseHolders(list []any) (holders []holder, err error) {
	for len(list) > 0 {
		var held int
		var h holder
		if list, err = redis.Scan(list, &held, &h.name, &h.unstarted, &h.tokens); err != nil {
			return nil, err
		}
		h.held, h.name = time.Duration(held)*time.Second, displayName(h.name)
		holders = append(holders, h)
	}
	slices.SortStableFunc(holders, func(a, b holder) int { return cmp.Compare(b.held, a.held) })
	return holders, nil
}

// displayName is the name of a pod, or a token, that is safe to show: any client that can
// write to Redis may have stored anything.
func displayName(name string) string {
	if isPodName(name) {
		return name
	}
	return printable(truncate(name, 40))
}

func (h holder) String() string {
	name, started, several := h.name, "", ""
	if h.tokens > 1 {
		several = fmt.Sprintf(", %d tokens", h.tokens)
	}
	if h.held == heldUnknown {
		return name + several
	}
	if strings.HasSuffix(name, "-") { // the API server makes the name
		name += "..."
	}
	if h.unstarted {
		started = ", " + notStarted
	}
	return fmt.Sprintf("%s (%s%s%s)", name, roughly(h.held), several, started)
}

// podsOf returns how many pods have the tokens in use, if some have several and all pods
// are known; or else 0.
func podsOf(holders []holder, inUse int) int {
	sum := 0
	for _, h := range holders {
		sum += h.tokens
	}
	if sum == inUse && len(holders) < sum {
		return len(holders)
	}
	return 0
}

// notStarted says of a holder that no sidecar has confirmed its token so far.
const notStarted = "not started yet"

// byHolders lists the holders of the tokens in use. It stops at 500 bytes, because
// Kubernetes cuts the message of an event at 1024 bytes.
func byHolders(holders []holder, inUse int) string {
	const most = 500
	var text string
	named := 0 // tokens of the holders in text
	for _, h := range holders {
		if len(text)+len(h.String()) > most {
			break
		}
		if named > 0 {
			text += ", "
		}
		text += h.String()
		named += max(1, h.tokens)
	}
	switch {
	case named == 0:
		return ""
	case inUse > named:
		return fmt.Sprintf("by %s, and %d more", text, inUse-named)
	}
	return "by " + text
}
