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

// clusterSlots is the number of hash slots of a Redis Cluster.
const clusterSlots = 16384

// slot returns the hash slot of a semaphore's keys: the CRC16 (XMODEM) of their hash tag.
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

// slotRange is a range of slots that one master serves.
type slotRange struct {
	from, to int // both included
	address  string
}

// clusterQueue is a queue on a Redis Cluster. Each of its primaries (masters) serves a
// part of the slots.
type clusterQueue struct {
	address   queueAddress
	settings  redisSettings
	maxIdle   int
	log       *slog.Logger
	discovery *discovery

	mu      sync.Mutex
	servers map[string]*queueServer // by address
	suspect map[string]bool         // addresses at which a command has failed since the last successful check
	ranges  []slotRange             // from the last look-up
	moved   map[int]string          // addresses from MOVED since then, by slot
}

func newClusterQueue(address queueAddress, settings redisSettings, maxIdle int, log *slog.Logger) *clusterQueue {
	q := &clusterQueue{address: address, settings: settings, maxIdle: maxIdle, log: log,
		servers: map[string]*queueServer{}, suspect: map[string]bool{}, moved: map[int]string{}}
	q.discovery = newDiscovery(q.lookUp)
	return q
}

// find implements tokenServers.
func (q *clusterQueue) find(ctx context.Context, id semaphoreID) (*queueServer, error) {
	slot := id.slot()
	server, certain := q.serverOf(slot)
	if certain {
		return server, nil
	}
	if err := q.discovery.wait(ctx); err != nil {
		return nil, fmt.Errorf("queue Redis %s: %w", q.address, err)
	}
	if server, certain = q.serverOf(slot); server == nil {
		return nil, fmt.Errorf("queue Redis %s: %w: no node serves slot %d", q.address, errUnreached, slot)
	}
	if !certain {
		return nil, fmt.Errorf("%s: %w: it does not answer, and has no successor yet", server, errUnreached)
	}
	return server, nil
}

// primaries implements tokenServers. It also looks for masters that have joined: the next
// call returns them.
func (q *clusterQueue) primaries(ctx context.Context) ([]*queueServer, error) {
	q.discovery.start()
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

// serverOf returns the known server of a slot, and whether it can be used without a
// look-up.
func (q *clusterQueue) serverOf(slot int) (server *queueServer, certain bool) {
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
	return q.serverLocked(address), !q.suspect[address]
}

// at implements tokenServers.
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

// failed implements tokenServers.
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
		q.discovery.start() // other slots may have moved, too
	case q.servers[server.address] == server:
		q.discovery.noteFailed(err)
		q.suspect[server.address] = true
	}
}

// isSlotMoving reports whether a command was not, or only partly, run because its slot is
// moving to another node.
func isSlotMoving(err error) bool {
	var answered redis.Error
	return errors.As(err, &answered) &&
		(strings.HasPrefix(answered.Error(), "TRYAGAIN") || strings.HasPrefix(answered.Error(), "ASK ") ||
			isPartlyRun(answered))
}

// redirection returns the address in a server's redirection of a kind: MOVED or ASK.
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

// nodeAddress returns the address of a node that the node from names. An empty host, or
// "?", means the host of from.
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

// part implements tokenServers: a slot fails and recovers with its master.
func (q *clusterQueue) part(id semaphoreID) int { return id.slot() }

// checks implements tokenServers. The slots lie far apart, so that each master of a small
// Cluster probably has one.
func (q *clusterQueue) checks() []semaphoreID {
	var ids []semaphoreID
	for n := range 8 {
		ids = append(ids, checkID(n))
	}
	return ids
}

// close implements tokenServers.
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

// lookUp asks the nodes for the masters of the slots, until no master is doubted, or one
// fewer than before. It asks each doubted master itself. While that one does not answer,
// the other nodes may start a failover.
func (q *clusterQueue) lookUp(ctx context.Context, note func(error)) error {
	checks := newRoleChecks(q.settings)
	fewest := clusterSlots // doubted masters so far
	for ctx.Err() == nil {
		ranges, err := q.askNodes(ctx)
		if err != nil {
			note(err)
			_ = sleep(ctx, lookupPause)
			continue
		}
		doubted := q.adopt(ranges)
		if len(doubted) == 0 || len(doubted) < fewest && fewest < clusterSlots {
			return nil
		}
		fewest = len(doubted)
		for _, address := range doubted {
			checks.start(ctx, address)
		}
		checked, err := checks.wait(ctx)
		if err == nil && checked != "" {
			q.clearDoubt(checked)
			return nil
		}
		note(err)
	}
	return ctx.Err()
}

// askNodes returns the slots as a node describes them. It prefers the first answer
// without a doubted master.
func (q *clusterQueue) askNodes(ctx context.Context) (ranges []slotRange, err error) {
	ctx, cancel := context.WithTimeout(ctx, requeryAfter)
	defer cancel()
	err = fanOut(ctx, q.nodes(), q.askNode, func(answer []slotRange) (enough bool) {
		good := len(q.doubtedMasters(answer)) == 0
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

func (q *clusterQueue) askNode(ctx context.Context, node string) (ranges []slotRange, err error) {
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

// readSlots reads a node's answer to CLUSTER SLOTS.
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

// nodes returns the addresses to ask: those of the flag, and those of the masters that
// look-ups found.
func (q *clusterQueue) nodes() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	nodes := slices.Concat(q.address.servers, slices.Collect(maps.Keys(q.servers)))
	slices.Sort(nodes)
	return slices.Compact(nodes)
}

// doubtedMasters returns the masters of these slots at which a command has failed.
func (q *clusterQueue) doubtedMasters(ranges []slotRange) (addresses []string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range ranges {
		if q.suspect[r.address] && !slices.Contains(addresses, r.address) {
			addresses = append(addresses, r.address)
		}
	}
	return addresses
}

// adopt takes over the masters of the slots, and returns the doubted ones.
func (q *clusterQueue) adopt(ranges []slotRange) (doubted []string) {
	q.mu.Lock()
	masters := map[string]bool{}
	for _, r := range ranges {
		masters[r.address] = true
	}
	if q.ranges != nil && !slices.Equal(q.ranges, ranges) {
		q.settings.counts.failedOver()
		q.log.Warn("the queue's Cluster has changed", "queueRedis", q.address.text,
			"masters", strings.Join(slices.Sorted(maps.Keys(masters)), ","))
	}
	q.ranges = ranges
	clear(q.moved)
	for address, s := range q.servers {
		if !masters[address] {
			delete(q.servers, address)
			delete(q.suspect, address)
			_ = s.close()
		}
	}
	q.mu.Unlock()
	return q.doubtedMasters(ranges)
}

// clearDoubt notes that a server has said that it is a master.
func (q *clusterQueue) clearDoubt(address string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.suspect, address)
}
