// Package page shows the page of "status serve" to a real Chromium. "make test-page" runs
// it.
package page

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestMain(m *testing.M) { rig.Main(m, "make test-page") }

var pictureFlag = flag.String("picture", "", "FILE that gets a picture of a semaphore")

// fill writes a semaphore into Redis, as the scripts do: its length, and its pods with
// tokens, and in line.
func fill(t *testing.T, r *rig.Redis, name string, length, holders, waiters int) {
	t.Helper()
	now := r.Now(t)
	key := func(kind string) string { return kind + "/{" + name + "}" }
	inflight, waiting, seen, names := []any{key("inflight")}, []any{key("waiters")}, []any{key("seen")}, []any{key("names")}
	for i := range holders {
		token := fmt.Sprintf("6f2c1e0a-7d0b-4c43-9d2f-%012d", i)
		inflight = append(inflight, now-3, token)
		names = append(names, token+"/pod", fmt.Sprintf("%d web-7d4b-%05d node-%d", now-190*(i%4+1), i, i%9))
	}
	for i := range waiters {
		token := fmt.Sprintf("0b9d5c1e-5a4e-4f0f-8c11-%012d", i)
		waiting, seen = append(waiting, (now-41)*1000000+i, token), append(seen, now-1, token)
		names = append(names, token, length, token+"/pod", fmt.Sprintf("0 web-9c8f-%05d node-%d", i, i%9))
	}
	r.Do(t, "HSET", key("state"), "created", now-9000, "touched", now, "length", length, "holds", "FGHIJIHG")
	for i, how := range []string{"reclaimed 0 5400", "gaveUp 300 -1", "released 41 900"} {
		r.Do(t, "RPUSH", key("history"), fmt.Sprintf("%d %s 1 web-5f6d-%05d node-%d", now-3600+1700*i, how, i, i))
	}
	for command, all := range map[string][][]any{"ZADD": {inflight, waiting, seen}, "HSET": {names}} {
		for _, args := range all {
			if len(args) > 1 {
				r.Do(t, command, args...)
			}
		}
	}
}

// servePage serves the page of a Redis, and returns its address.
func servePage(t *testing.T, r *rig.Redis) string {
	t.Helper()
	p := rig.NewProcess(rig.Program(t), "status", "serve", "--port=0", "--queue-redis-address="+r.Address)
	p.Start(t)
	return p.WantLog(t, "serving the page")["address"].(string)
}

const (
	title   = "document.getElementById('title').textContent"
	state   = "document.getElementById('state').textContent"
	body    = "document.body.innerText"
	focused = "document.activeElement.textContent"
)

// A person finds a semaphore, looks at it, and goes back, by keyboard. The page stays live,
// and what Redis has is text in it, never HTML.
func TestPage(t *testing.T) {
	r := rig.StartRedis(t)
	fill(t, r, "shop/web", 3, 3, 5)
	evil := `<img src=x onerror="document.title='owned'">`
	for _, name := range []string{"shop/" + evil, "shop/a.b_c-d/e", "@/matlab"} {
		fill(t, r, name, 1, 1, 1)
	}
	r.Do(t, "ZADD", "inflight/{shop/a.b_c-d/e}", r.Now(t), evil)
	b := startBrowser(t)
	b.resize(1000, 700)
	b.open(servePage(t, r))
	b.want(body, "LONGEST WAIT")
	b.want(body, evil[:len("<img src=x")])

	const tab, enter = 9, 13
	b.press("Tab", tab)
	b.call("Input.insertText", map[string]any{"text": "shop/web"}, nil)
	b.want("document.querySelectorAll('tbody tr').length", "1")
	for range 2 { // the table, the link
		b.press("Tab", tab)
	}
	b.want(focused, "web")
	before := b.eval(state)
	rig.Eventually(t, time.Minute, func() error { // what is read anew keeps the focus
		if b.eval(state) == before {
			return fmt.Errorf("the page still says %q", before)
		}
		return nil
	})
	b.want(focused, "web")
	b.press("Enter", enter)
	b.want(title, "shop/web")
	for _, text := range []string{"3 of 3 tokens in use (0 stale), 0 free, 5 waiting in line", "HOLDER", "web-7d4b-00002", "2nd", "in about ", "gave up",
		"tokens in use (solid), at most 3; pods waiting (dashed), at most 5"} {
		b.want(body, text)
	}
	if *pictureFlag != "" {
		b.resize(1000, 900)
		b.eval(`last.chart = Array.from({length: 120}, (_, i) => ({
			inUse: i < 30 ? -1 : i < 45 ? 1 : i < 50 ? 2 : 3, waiting: i < 50 ? 0 : Math.round(3 + 2 * Math.sin(i / 8))})); draw()`)
		rig.Must(t, os.WriteFile(*pictureFlag, b.picture(), 0o644))
	}
	r.Do(t, "ZREM", "inflight/{shop/web}", fmt.Sprintf("6f2c1e0a-7d0b-4c43-9d2f-%012d", 2))
	b.want(body, "2 of 3 tokens in use")

	b.press("Tab", tab)
	b.want(focused, "All semaphores")
	b.press("Enter", enter)
	b.want(title, "Semaphores")
	for name, text := range map[string]string{"shop/a.b_c-d/e": evil[:len("<img src=x")], "@matlab": "1 of 1 tokens in use"} {
		b.eval("location.hash = encodeURIComponent('" + name + "')")
		b.want(title, name)
		b.want(body, text)
	}
	if got := b.eval("document.title"); strings.Contains(got, "owned") || len(b.faults) > 0 {
		t.Errorf("the title is %q, and the browser complains of %q", got, b.faults)
	}

	b.eval("location.hash = 'shop%2Fweb'")
	b.want(body, "2 of 3 tokens in use")
	light := b.eval("getComputedStyle(document.body).backgroundColor")
	b.call("Emulation.setEmulatedMedia", map[string]any{
		"features": []map[string]string{{"name": "prefers-color-scheme", "value": "dark"}}}, nil)
	if dark := b.eval("getComputedStyle(document.body).backgroundColor"); dark == light {
		t.Errorf("in dark mode, the background is %s, too", dark)
	}
	b.resize(360, 640)
	b.want("document.documentElement.scrollWidth <= innerWidth", "true")
}

// While Redis hangs, the page says so, and since when it shows the same. Then it goes on.
func TestPageOfAHangingRedis(t *testing.T) {
	r := rig.StartRedis(t)
	fill(t, r, "shop/web", 3, 3, 5)
	b := startBrowser(t)
	address := servePage(t, r)
	b.open(address + "/#shop%2Fweb")
	b.want(body, "3 of 3 tokens in use")
	r.Pause(t)
	b.want(state, "Redis has not answered for 3 s; this is from ")
	b.want(body, "3 of 3 tokens in use")
	r.Resume(t)
	b.want(state, "updated at ")
	b.open(address + "/#shop")
	b.want(state, `"shop" is no name of a semaphore`)
}

// The page shows thousands of semaphores, and a line of ten thousand.
func TestLargePage(t *testing.T) {
	r := rig.StartRedis(t)
	for i := range 1999 {
		fill(t, r, fmt.Sprintf("shop/key-%04d", i), 3, 1, 0)
	}
	fill(t, r, "shop/line", 1000, 1000, 10000)
	b := startBrowser(t)
	address := servePage(t, r)
	b.open(address)
	b.want(body, "and 1700 more")
	b.open(address + "/#shop%2Fline")
	b.want(body, "10000 waiting in line")
	b.want(body, "and 9700 more")
	b.want(body, "300th")
}
