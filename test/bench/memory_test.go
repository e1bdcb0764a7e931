package bench

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	memoryConnections = 8
	memoryWorkers     = 4 // of each connection
	memoryLength      = 5
	memoryPerKey      = 10 // admissions

	// Limits for the growth of a webhook between the first and the last measurement, in
	// bytes. With a million admissions, that is less than a dozen for each key.
	memoryHeapGrowth     = 1 << 20
	memoryResidentGrowth = 8 << 20 // includes the free part of Go's heap
)

// memoryLooks returns the numbers of admissions after which the test measures the memory.
func memoryLooks(t *testing.T) []int64 {
	t.Helper()
	all, err := strconv.ParseInt(cmp.Or(os.Getenv("MEMORY_ADMISSIONS"), "1000000"), 10, 64)
	rig.Must(t, err)
	return []int64{all / 10, 3 * all / 10, all}
}

// memoryTraffic admits pods of many keys, and gives all tokens back.
type memoryTraffic struct {
	ctx  context.Context
	body []byte // of a review with the key memoryKey

	keys, admitted, refused, released, total atomic.Int64
}

// memoryKey stands for the key in memoryTraffic.body.
const memoryKey = "the-key-goes-here"

// useKey takes all tokens of one key, asks in vain for one more, gives them back, and
// takes some again.
func (m *memoryTraffic) useKey(connection *target, control redis.Conn) error {
	id := rig.ID{Namespace: "shop", Key: fmt.Sprintf("web-%d", m.keys.Add(1))}
	body := bytes.ReplaceAll(m.body, []byte(memoryKey), []byte(id.Key))
	for i := range memoryPerKey {
		text, err := connection.do(http.MethodPost, body)
		if err != nil {
			return err
		}
		want, count := `"allowed":true`, &m.admitted
		if i == memoryLength || i == memoryLength+1 {
			want, count = "5 of 5 tokens in use", &m.refused
		}
		if !bytes.Contains(text, []byte(want)) {
			return fmt.Errorf("%s: admission %d was answered %s", id, i+1, text)
		}
		count.Add(1)
		m.total.Add(1)
		if i == memoryLength+1 {
			if err := m.giveBackAll(control, id); err != nil {
				return err
			}
		}
	}
	err := m.giveBackAll(control, id)
	if err == nil {
		// Delete the keys as if they had expired. Then only the webhook could still hold
		// them.
		_, err = control.Do("DEL", id.Keys()...)
	}
	return err
}

func (m *memoryTraffic) giveBackAll(control redis.Conn, id rig.ID) error {
	tokens, err := redis.Strings(control.Do("ZRANGE", id.InflightKey(), 0, -1))
	for _, token := range tokens {
		if err == nil {
			_, err = runScript(control, "release", id, token)
			m.released.Add(1)
		}
	}
	return err
}

// "make bench-memory" sends one webhook a million pods of a hundred thousand keys, over
// several connections. The test fails if the webhook keeps memory for them.
func TestBenchMemory(t *testing.T) {
	r := rig.StartRedis(t)
	r.Do(t, "CONFIG", "SET", "appendonly", "no") // Redis is not measured
	w := startWebhook(t, r, os.DevNull)
	ctx, end := context.WithCancel(context.Background())
	m := &memoryTraffic{ctx: ctx, body: rig.Review(t, rig.ID{Namespace: "shop", Key: memoryKey}, memoryLength)}
	var workers sync.WaitGroup
	defer workers.Wait()
	defer end()
	for range memoryConnections {
		connection := newTarget(t, w.url, w.statistics)
		for range memoryWorkers {
			control := r.Dial(t)
			workers.Go(func() {
				defer control.Close()
				for ctx.Err() == nil {
					if err := m.useKey(connection, control); err != nil && ctx.Err() == nil {
						t.Error(err)
						end()
					}
				}
			})
		}
	}

	fmt.Printf("%d connections, %d admissions at once, %d admissions of each key\n\n%s\n%s\n",
		memoryConnections, memoryConnections*memoryWorkers, memoryPerKey,
		"| admissions | admitted | refused | released | keys "+
			"| resident, MiB | Go heap in use, MiB | live, MiB | goroutines |",
		"| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	var looks []memoryLook
	for _, after := range memoryLooks(t) {
		if !m.wait(after) {
			return
		}
		look := lookAtMemory(t, w)
		looks = append(looks, look)
		const mib = 1 << 20
		fmt.Printf("| %d | %d | %d | %d | %d | %.1f | %.1f | %.2f | %.0f |\n",
			m.total.Load(), m.admitted.Load(), m.refused.Load(), m.released.Load(), m.keys.Load(),
			look.resident/mib, look.heap/mib, look.live/mib, look.goroutines)
	}
	first, last := looks[0], looks[len(looks)-1]
	if grown := last.live - first.live; grown > memoryHeapGrowth {
		t.Errorf("the live part of Go's heap has grown by %.0f bytes from the first look to the last, want at most %d",
			grown, memoryHeapGrowth)
	}
	if grown := last.resident - first.resident; grown > memoryResidentGrowth {
		t.Errorf("the resident set has grown by %.0f bytes from the first look to the last, want at most %d",
			grown, memoryResidentGrowth)
	}
}

// wait waits for a number of admissions. It returns false if the traffic ends first.
func (m *memoryTraffic) wait(admissions int64) bool {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for m.total.Load() < admissions {
		select {
		case <-tick.C:
		case <-m.ctx.Done():
			return false
		}
	}
	return true
}

// memoryLook has a process's memory over some seconds, in bytes. live is the smallest
// heap after a garbage collection; the others are maxima.
type memoryLook struct{ resident, heap, live, goroutines float64 }

func lookAtMemory(t *testing.T, w *target) (look memoryLook) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 100 {
		process := w.statistic(t)
		look.resident = max(look.resident, process("process_resident_memory_bytes"))
		look.heap = max(look.heap, process("go_memstats_heap_inuse_bytes"))
		look.goroutines = max(look.goroutines, process("go_goroutines"))
		if live := process("go_memstats_heap_alloc_bytes"); look.live == 0 || live < look.live {
			look.live = live
		}
		<-tick.C
	}
	return look
}
