//go:build bench

package main

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

	// What a webhook may have grown by from the first look to the last, in bytes: less than a dozen for each key that it has seen
	// meanwhile, if a million are admitted.
	memoryHeapGrowth     = 1 << 20
	memoryResidentGrowth = 8 << 20 // also what is free in Go's heap
)

// memoryLooks is after how many admissions the memory is looked at.
func memoryLooks(t *testing.T) []int64 {
	t.Helper()
	all, err := strconv.ParseInt(cmp.Or(os.Getenv("MEMORY_ADMISSIONS"), "1000000"), 10, 64)
	rig.Must(t, err)
	return []int64{all / 10, 3 * all / 10, all}
}

// "make bench-memory" lets one process of the webhook decide on a million pods of a hundred thousand keys, over several connections: what it
// keeps of any of them shows.
func TestBenchMemory(t *testing.T) {
	r := rig.StartRedis(t)
	r.Do(t, "CONFIG", "SET", "appendonly", "no") // it is not Redis that is measured
	w := startBenchWebhook(t, r, os.DevNull)
	const keyHere = "the-key-goes-here"
	body := rig.Review(t, semaphoreID{"shop", keyHere}, memoryLength)
	var keys, admitted, refused, released, total atomic.Int64
	ctx, end := context.WithCancel(context.Background())
	defer end()
	failed := func(err error) {
		t.Error(err)
		end()
	}
	// useKey is what becomes of one key: it is used up, asked for in vain, all are given back, and some are taken again.
	useKey := func(connection *target, s *semaphores, control redis.Conn) error {
		id := semaphoreID{"shop", fmt.Sprintf("web-%d", keys.Add(1))}
		body := bytes.ReplaceAll(body, []byte(keyHere), []byte(id.key))
		giveBackAll := func() error {
			tokens, err := redis.Strings(control.Do("ZRANGE", id.inflightKey(), 0, -1))
			for _, token := range tokens {
				if err == nil {
					_, err = s.release(ctx, id, token)
					released.Add(1)
				}
			}
			return err
		}
		for i := range memoryPerKey {
			text, err := connection.do(http.MethodPost, body)
			if err != nil {
				return err
			}
			says, count := `"allowed":true`, &admitted
			if i == memoryLength || i == memoryLength+1 {
				says, count = "5 of 5 tokens in use", &refused
			}
			if !bytes.Contains(text, []byte(says)) {
				return fmt.Errorf("%s: admission %d was answered %s", id, i+1, text)
			}
			count.Add(1)
			total.Add(1)
			if i == memoryLength+1 {
				if err := giveBackAll(); err != nil {
					return err
				}
			}
		}
		err := giveBackAll()
		if err == nil {
			_, err = control.Do("DEL", id.keys()...) // as if they had expired: what is left is what the webhook remembers
		}
		return err
	}
	var workers sync.WaitGroup
	defer workers.Wait()
	defer end()
	s := testSemaphores(t, r.Address)
	for range memoryConnections {
		connection := newTarget(t, w.url, w.statistics)
		for range memoryWorkers {
			control, err := redis.Dial("tcp", r.Address)
			rig.Must(t, err)
			workers.Go(func() {
				defer control.Close()
				for ctx.Err() == nil {
					if err := useKey(connection, s, control); err != nil && ctx.Err() == nil {
						failed(err)
					}
				}
			})
		}
	}

	fmt.Printf("%d connections, %d admissions at once, %d admissions of each key\n\n%s\n%s\n", memoryConnections, memoryConnections*memoryWorkers, memoryPerKey,
		"| admissions | admitted | refused | released | keys | resident, MiB | Go heap in use, MiB | live, MiB | goroutines |",
		"| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	var looks []memoryLook
	for _, after := range memoryLooks(t) {
		for total.Load() < after {
			if sleep(ctx, 100*time.Millisecond) != nil {
				return
			}
		}
		look := lookAtMemory(t, w)
		looks = append(looks, look)
		const mib = 1 << 20
		fmt.Printf("| %d | %d | %d | %d | %d | %.1f | %.1f | %.2f | %.0f |\n", total.Load(), admitted.Load(), refused.Load(), released.Load(), keys.Load(),
			look.resident/mib, look.heap/mib, look.live/mib, look.goroutines)
	}
	first, last := looks[0], looks[len(looks)-1]
	if grown := last.live - first.live; grown > memoryHeapGrowth {
		t.Errorf("what is live in Go's heap has grown by %.0f bytes from the first look to the last, want at most %d", grown, memoryHeapGrowth)
	}
	if grown := last.resident - first.resident; grown > memoryResidentGrowth {
		t.Errorf("the resident set has grown by %.0f bytes from the first look to the last, want at most %d", grown, memoryResidentGrowth)
	}
}

// memoryLook is what a process has for some seconds, in bytes: at most, and live what is left in its heap after garbage was collected.
type memoryLook struct{ resident, heap, live, goroutines float64 }

func lookAtMemory(t *testing.T, w *target) (look memoryLook) {
	t.Helper()
	for range 100 {
		process := w.statistic(t)
		look.resident = max(look.resident, process("process_resident_memory_bytes"))
		look.heap = max(look.heap, process("go_memstats_heap_inuse_bytes"))
		look.goroutines = max(look.goroutines, process("go_goroutines"))
		if live := process("go_memstats_heap_alloc_bytes"); look.live == 0 || live < look.live {
			look.live = live
		}
		time.Sleep(50 * time.Millisecond)
	}
	return look
}
