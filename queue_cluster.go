package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/gomodule/redigo/redis"
)

// clusterSlots is how many slots the keys of a Redis Cluster are spread over.
const clusterSlots = 16384

// slot is the slot of a semaphore's keys: the CRC16 (XMODEM) of their hash tag.
func (id semaphoreID) slot() int {
	var crc uint16
	for _, b := range []byte(id.String()) {
		crc ^= uint16(b) << 8
		for range 8 {
			carry := crc&0x8000 != 0
			crc <<= 1
			if carry {
				crc ^= 0x1021
			}
		}
	}
	return int(crc) % clusterSlots
}

// slotRange are slots that one master serves.
type slotRange struct {
	from, to int // both included
	address  string
}

// clusterQueue is a queue of several primaries, masters, each of which serves a part of the slots.
type clusterQueue struct {
	address   queueAddress
	settings  redisSettings
	maxIdle   int
	log       *slog.Logger
	discovery *discovery

	mu      sync.Mutex
	servers map[string]*queueServer // by address
	doubted map[string]bool         // those of them on which a command has failed since they were known to be masters
	ranges  []slotRange             // as a node said last
	moved   map[int]string          // by slot: what MOVED said since then
}

func newClusterQueue(address queueAddress, settings redisSettings, maxIdle int, log *slog.Logger) *clusterQueue {
	q := &clusterQueue{address: address, settings: settings, maxIdle: maxIdle, log: log,
		servers: map[string]*queueServer{}, doubted: map[string]bool{}, moved: map[int]string{}}
	q.discovery = newDiscovery(q.look)
	return q
}

// find implements queue.
func (q *clusterQueue) find(ctx context.Context, id semaphoreID) (*queueServer, error) {
	slot := id.slot()
	server, certain := q.known(slot)
	if certain {
		return server, nil
	}
	if err := q.discovery.wait(ctx); err != nil {
		return nil, fmt.Errorf("queue Redis %s: %w", q.address, err)
	}
	if server, certain = q.known(slot); server == nil {
		return nil, fmt.Errorf("queue Redis %s: %w: no node serves slot %d", q.address, errUnreached, slot)
	}
	if !certain {
		return nil, fmt.Errorf("%s: %w: it does not answer, and has no successor yet", server, errUnreached)
	}
	return server, nil
}

// primaries implements queue.
func (q *clusterQueue) primaries(ctx context.Context) ([]*queueServer, error) {
	if _, err := q.find(ctx, semaphoreID{}); err != nil && !errors.Is(err, errUnreached) {
		return nil, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.ranges) == 0 {
		return nil, fmt.Errorf("queue Redis %s: %w", q.address, errUnreached)
	}
	masters := map[string]*queueServer{}
	for _, r := range q.ranges {
		masters[r.address] = q.serverLocked(r.address)
	}
	return slices.Collect(maps.Values(masters)), nil
}

// known returns the server of a slot, if it is known, and whether it need not be looked up first.
func (q *clusterQueue) known(slot int) (server *queueServer, certain bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	address := q.moved[slot]
	for _, r := range q.ranges {
		if address == "" && r.from <= slot && slot <= r.to {
			address = r.address
		}
	}
	if address == "" {
		return nil, false
	}
	return q.serverLocked(address), !q.doubted[address]
}

// at implements queue.
func (q *clusterQueue) at(address string) *queueServer {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.serverLocked(address)
}

func (q *clusterQueue) serverLocked(address string) *queueServer {
	server, ok := q.servers[address]
	if !ok {
		server = newQueueServer(address, q.settings, q.maxIdle)
		q.servers[address] = server
	}
	return server
}

// failed implements queue.
func (q *clusterQueue) failed(server *queueServer, id semaphoreID, err error) {
	to, moved := redirection(server, err, "MOVED")
	if !moved && isSlotMoving(err) {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case moved:
		q.moved[id.slot()] = to
		q.discovery.start() // others may have moved, too
	case q.servers[server.address] == server:
		q.discovery.noteFailed(err)
		q.doubted[server.address] = true
	}
}

// isSlotMoving reports whether a command was not, or not wholly, run because its keys are on the way to another node.
func isSlotMoving(err error) bool {
	var answered redis.Error
	return errors.As(err, &answered) &&
		(strings.HasPrefix(answered.Error(), "TRYAGAIN") || strings.HasPrefix(answered.Error(), "ASK ") || isPartlyRun(answered))
}

// redirection returns the address to which an answer of a server, MOVED or ASK, sends us.
func redirection(from *queueServer, err error, kind string) (address string, ok bool) {
	var answered redis.Error
	if !errors.As(err, &answered) {
		return "", false
	}
	words := strings.Fields(answered.Error())
	if len(words) != 3 || words[0] != kind {
		return "", false
	}
	host, port, err := net.SplitHostPort(words[2])
	if err != nil {
		return "", false
	}
	return nodeAddress(from.address, host, port), true
}

// nodeAddress is the address of a node that another names. No host, or "?", stands for its own.
func nodeAddress(from, host, port string) string {
	scheme, hostPort := "", from
	if before, after, found := strings.Cut(from, "://"); found {
		scheme, hostPort = before+"://", after
	}
	if host == "" || host == "?" {
		host, _, _ = net.SplitHostPort(hostPort)
	}
	return scheme + net.JoinHostPort(host, port)
}

// part implements queue: a slot fails and comes back with its master.
func (q *clusterQueue) part(id semaphoreID) int { return id.slot() }

// checks implements queue. Their slots lie far apart, so that each master of a small Cluster is likely to have one.
func (q *clusterQueue) checks() []semaphoreID {
	var ids []semaphoreID
	for n := range 8 {
		ids = append(ids, checkID(n))
	}
	return ids
}

// close implements queue.
func (q *clusterQueue) close() error {
	q.discovery.close()
	q.mu.Lock()
	defer q.mu.Unlock()
	var errs []error
	for _, s := range q.servers {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

// look asks the nodes who serves which slot, until none of those that they name is in doubt, or one less than before. A master that
// is in doubt is asked itself; while it does not answer, the others may find out that it is gone.
func (q *clusterQueue) look(ctx context.Context, note func(error)) error {
	checks := newRoleChecks(q.settings)
	least := clusterSlots // masters in doubt so far
	for ctx.Err() == nil {
		ranges, err := q.ask(ctx)
		if err != nil {
			note(err)
			_ = sleep(ctx, lookupPause)
			continue
		}
		doubted := q.adopt(ranges)
		if len(doubted) == 0 || len(doubted) < least && least < clusterSlots {
			return nil
		}
		least = len(doubted)
		for _, address := range doubted {
			checks.start(ctx, address)
		}
		checked, err := checks.wait(ctx)
		if err == nil && checked != "" {
			q.trust(checked)
			return nil
		}
		note(err)
	}
	return ctx.Err()
}

// ask returns what a node says about the slots: the first that names no master that is in doubt, if there is one.
func (q *clusterQueue) ask(ctx context.Context) (ranges []slotRange, err error) {
	ctx, cancel := context.WithTimeout(ctx, askAgain)
	defer cancel()
	err = fanOut(ctx, q.nodes(), q.askOne, func(answer []slotRange) (enough bool) {
		good := len(q.inDoubt(answer)) == 0
		if ranges == nil || good {
			ranges = answer
		}
		return good
	})
	if ranges != nil {
		err = nil
	}
	return ranges, err
}

func (q *clusterQueue) askOne(ctx context.Context, node string) (ranges []slotRange, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", node, err)
		}
	}()
	reply, err := query(ctx, node, q.settings, "CLUSTER", "SLOTS")
	if err != nil {
		return nil, err
	}
	return readSlots(node, reply)
}

// readSlots reads what a node says about the slots.
func readSlots(node string, reply any) (ranges []slotRange, err error) {
	entries, err := redis.Values(reply, nil)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		fields, err := redis.Values(e, nil)
		var r slotRange
		var master []any
		if err == nil {
			_, err = redis.Scan(fields, &r.from, &r.to, &master)
		}
		var host string
		var port int
		if err == nil {
			_, err = redis.Scan(master, &host, &port)
		}
		if err != nil {
			return nil, fmt.Errorf("unexpected answer: %w", err)
		}
		r.address = nodeAddress(node, host, strconv.Itoa(port))
		ranges = append(ranges, r)
	}
	if len(ranges) == 0 {
		return nil, errors.New("it knows of no master: is it in a Cluster?")
	}
	return ranges, nil
}

// nodes are those to ask: all that are named in the address, and those that were found.
func (q *clusterQueue) nodes() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	nodes := slices.Concat(q.address.servers, slices.Collect(maps.Keys(q.servers)))
	slices.Sort(nodes)
	return slices.Compact(nodes)
}

// inDoubt are the masters of these slots on which a command has failed.
func (q *clusterQueue) inDoubt(ranges []slotRange) (addresses []string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range ranges {
		if q.doubted[r.address] && !slices.Contains(addresses, r.address) {
			addresses = append(addresses, r.address)
		}
	}
	return addresses
}

// adopt takes over who serves which slot, and returns those of the masters that are in doubt.
func (q *clusterQueue) adopt(ranges []slotRange) (doubted []string) {
	q.mu.Lock()
	masters := map[string]bool{}
	for _, r := range ranges {
		masters[r.address] = true
	}
	if q.ranges != nil && !slices.Equal(q.ranges, ranges) {
		q.settings.counts.failedOver()
		q.log.Warn("the queue's Cluster has changed", "queueRedis", q.address.text, "masters", strings.Join(slices.Sorted(maps.Keys(masters)), ","))
	}
	q.ranges = ranges
	clear(q.moved)
	for address, s := range q.servers {
		if !masters[address] {
			delete(q.servers, address)
			delete(q.doubted, address)
			_ = s.close()
		}
	}
	q.mu.Unlock()
	return q.inDoubt(ranges)
}

// trust takes a master out of doubt.
func (q *clusterQueue) trust(address string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.doubted, address)
}
