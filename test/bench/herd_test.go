package bench

import (
	"bytes"
	"cmp"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	herdPods    = 5000
	herdKeys    = 500
	herdLength  = 5               // half of the pods are admitted
	herdSlowest = 5 * time.Second // limit for each answer
	herdRounds  = 3
)

// herdAtOnce is the number of concurrent requests, each over a connection of its own. An
// API server with its default settings makes at most 600.
var herdAtOnce, _ = strconv.Atoi(cmp.Or(os.Getenv("HERD_AT_ONCE"), "600"))

// "make bench-growth" sends one webhook requests for thousands of pods, hundreds of them
// at once.
func TestBenchHerd(t *testing.T) {
	r := startRedis(t)
	w := startWebhook(t, r, filepath.Join(t.TempDir(), "log"))
	fmt.Printf("%d pods of %d keys, length %d, %d at once\n\n%s\n%s\n",
		herdPods, herdKeys, herdLength, herdAtOnce,
		"| admitted | refused | wrong | p50, ms | p99, ms | slowest, ms | answers/s |",
		"| --- | --- | --- | --- | --- | --- | --- |")
	for range herdRounds {
		herd(t, r, w)
	}
	fmt.Printf("\n%.0f MiB resident afterwards\n", w.statistic(t)("process_resident_memory_bytes")/(1<<20))
}

// herdAnswer is an answer to a pod of a herd.
type herdAnswer struct {
	key  int
	took time.Duration
	text []byte
	err  error
}

// crowdedText begins the answer to a request that finds too many others.
const crowdedText = "too many requests at once"

// herdError returns an error without the parts that differ between pods.
func herdError(err error) string {
	text := strings.TrimSpace(err.Error())
	if strings.Contains(text, crowdedText) {
		return fmt.Sprintf("with status %.3s: %s", text, crowdedText)
	}
	return regexp.MustCompile(`stream ID \d+|https://\S+|web-\d+`).ReplaceAllString(text, "...")
}

func herd(t *testing.T, r *rig.Redis, w *target) {
	t.Helper()
	var ids []rig.ID
	bodies := make([][]byte, herdKeys)
	for i := range bodies {
		ids = append(ids, rig.FreshID())
		bodies[i] = rig.Review(t, ids[i], herdLength)
	}
	answers, elapsed := askForHerd(w, bodies)
	wrong := map[string]int{}
	admitted, refused := make([]int, herdKeys), 0
	var took []time.Duration
	for _, a := range answers {
		took = append(took, a.took)
		switch {
		case a.err != nil:
			wrong[herdError(a.err)]++
		case bytes.Contains(a.text, []byte(`"allowed":true`)):
			admitted[a.key]++
		case bytes.Contains(a.text, []byte("5 of 5 tokens in use")):
			refused++
		default:
			wrong[string(a.text)]++
		}
	}
	total, wrongs := 0, 0
	for _, n := range admitted {
		total += n
	}
	for text, n := range wrong {
		wrongs += n
		t.Errorf("%d of %d were answered %s", n, herdPods, text)
	}
	slices.Sort(took)
	slowest := took[len(took)-1]
	fmt.Printf("| %d | %d | %d | %.0f | %.0f | %.0f | %.0f |\n", total, refused, wrongs,
		quantile(took, 0.5), quantile(took, 0.99), milliseconds(slowest), herdPods/elapsed.Seconds())
	uneven := 0
	for key, n := range admitted {
		queue, inflight, err := r.Counts(ids[key])
		rig.Must(t, err)
		if n > herdLength || inflight > herdLength {
			t.Errorf("%s: %d pods were admitted, and %d tokens are in use, of %d", ids[key], n, inflight, herdLength)
		}
		if n != herdLength || queue != 0 || inflight != herdLength {
			uneven++
		}
	}
	if uneven > 0 {
		t.Errorf("for %d of %d keys, admitted pods do not use all %d tokens", uneven, herdKeys, herdLength)
	}
	if slowest > herdSlowest {
		t.Errorf("the slowest answer took %s, want at most %s", slowest, herdSlowest)
	}
}

// askForHerd sends a review for each pod, herdAtOnce of them at once.
func askForHerd(w *target, bodies [][]byte) (answers []herdAnswer, elapsed time.Duration) {
	answers = make([]herdAnswer, herdPods)
	start, turns := make(chan struct{}), make(chan struct{}, herdAtOnce)
	var ready, pods sync.WaitGroup
	ready.Add(herdPods)
	for i := range answers {
		pods.Go(func() {
			ready.Done()
			<-start
			turns <- struct{}{}
			defer func() { <-turns }()
			begin, key := time.Now(), i%herdKeys
			text, err := w.do(http.MethodPost, bodies[key])
			answers[i] = herdAnswer{key, time.Since(begin), text, err}
		})
	}
	ready.Wait()
	begin := time.Now()
	close(start)
	pods.Wait()
	return answers, time.Since(begin)
}
