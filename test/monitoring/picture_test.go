package monitoring

import (
	"fmt"
	"html"
	"math"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// drawnPanel is a panel of the dashboard, with the data of a real Prometheus.
type drawnPanel struct {
	title, unit string
	lines       []drawnLine
}

type drawnLine struct {
	name   string
	values [][2]float64 // Unix seconds, value
}

// TestDrawDashboard draws docs/dashboard.svg. A real Prometheus scrapes two webhooks
// while pods come and go for some minutes. The picture has the queries, titles and
// legends of the dashboard.
func TestDrawDashboard(t *testing.T) {
	rig.SkipSlow(t, "make dashboard-picture")
	const length, lasts = 3, 4 * time.Minute
	r := rig.StartRedis(t)
	webhooks := []*rig.Webhook{rig.StartWebhook(t, r.Address), rig.StartWebhook(t, r.Address)}
	p := startPrometheus(t, rig.StartGate(t, rig.StartAPIServer(t), r.Address), webhooks...)
	start := time.Now()
	for i := 0; time.Since(start) < lasts; i++ {
		id := rig.ID{Namespace: "shop", Key: []string{"web", "mail", "report"}[i%3]}
		works := time.Duration(4+i%5) * time.Second
		if id.Key == "web" {
			startPod(t, r, id, fmt.Sprintf("web-%d", i), fmt.Sprintf("node-%d", i%4), uuid.NewString(), works,
				fmt.Sprintf("--length=%d", length), "--redis-addresses="+r.Address)
		} else {
			a := webhooks[i%2].Admit(t, rig.Review(t, id, length))
			if a.Allowed && i%30 != 1 { // the others have no sidecar and fall silent
				startPod(t, r, id, "", "", a.Token, works)
			}
		}
		rush := 1 + math.Sin(2*math.Pi*time.Since(start).Seconds()/80)
		<-time.After(time.Duration((1000 - 450*rush) * float64(time.Millisecond)))
	}
	picture := draw(p.panels(t, start, time.Now()))
	rig.Must(t, os.WriteFile(rig.Path("docs/dashboard.svg"), []byte(picture), 0o644))
}

// startPod starts the sidecar of a pod. Once the sidecar holds the token, the pod works
// for a while and ends.
func startPod(
	t *testing.T, r *rig.Redis, id rig.ID, name, node, token string, works time.Duration, flags ...string,
) {
	t.Helper()
	args := append([]string{"sidecar", "--queue-redis-address=" + r.Address}, flags...)
	p := rig.NewProcess(rig.Program(t), append(args, id.String(), token)...)
	p.Cmd.Env = append(os.Environ(), "POD_NAME="+name, "NODE_NAME="+node)
	p.OnLine = func(line string) {
		if strings.Contains(line, `"msg":"`+rig.HeldText+`"`) {
			time.AfterFunc(works, func() { _ = p.Cmd.Process.Signal(syscall.SIGTERM) })
		}
	}
	p.Start(t)
}

// panels queries the data of the dashboard.
func (p *prometheusServer) panels(t *testing.T, from, to time.Time) (panels []drawnPanel) {
	t.Helper()
	for _, panel := range readDashboard(t) {
		if panel.Type == "stat" { // a number
			continue
		}
		d := drawnPanel{title: panel.Title, unit: panel.FieldConfig.Defaults.Unit}
		for _, target := range panel.Targets {
			var data struct {
				Result []struct {
					Metric map[string]string
					Values [][2]any
				}
			}
			rig.Must(t, p.get("query_range", url.Values{
				"query": {target.query()}, "start": {unix(from)}, "end": {unix(to)}, "step": {"2"}}, &data))
			for _, r := range data.Result {
				line := drawnLine{name: target.LegendFormat}
				for label, value := range r.Metric {
					line.name = strings.ReplaceAll(line.name, "{{"+label+"}}", value)
				}
				for _, v := range r.Values {
					if value, err := strconv.ParseFloat(v[1].(string), 64); err == nil && !math.IsNaN(value) {
						line.values = append(line.values, [2]float64{v[0].(float64), value})
					}
				}
				d.lines = append(d.lines, line)
			}
		}
		panels = append(panels, d)
	}
	return panels
}

func unix(t time.Time) string { return strconv.FormatInt(t.Unix(), 10) }

// draw draws panels, three in a row.
func draw(panels []drawnPanel) string {
	const width, height, margin = 400, 220, 14
	colours := []string{"#3274d9", "#e0752d", "#56a64b", "#b877d9", "#e02f44", "#8f8f8f"}
	var b strings.Builder
	rows := (len(panels) + 2) / 3
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" `+
		`font-size="11">`+"\n", 3*width, rows*height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", 3*width, rows*height)
	for i, p := range panels {
		fmt.Fprintf(&b, `<g transform="translate(%d %d)">`+"\n", i%3*width, i/3*height)
		fmt.Fprintf(&b, `<rect x="4" y="4" width="%d" height="%d" fill="none" stroke="#ddd"/>`+
			`<text x="%d" y="22" font-weight="bold">%s</text>`+"\n",
			width-8, height-8, margin, html.EscapeString(p.title))
		p.drawLines(&b, width-2*margin, 130, margin, 34, colours)
		x := margin
		for j, l := range p.lines {
			if l.name == "" || x > width-100 {
				continue
			}
			fmt.Fprintf(&b, `<text x="%d" y="%d" fill="%s">%s</text>`+"\n",
				x, height-18, colours[j%len(colours)], html.EscapeString(l.name))
			x += 7*len(l.name) + 14
		}
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func (p drawnPanel) drawLines(b *strings.Builder, width, height, left, top float64, colours []string) {
	most, first, last := 0.0, math.Inf(1), 0.0
	for _, l := range p.lines {
		for _, v := range l.values {
			most, first, last = max(most, v[1]), min(first, v[0]), max(last, v[0])
		}
	}
	fmt.Fprintf(b, `<text x="%.0f" y="%.0f" fill="#777">%s</text>`+
		`<line x1="%.0f" y1="%.0f" x2="%.0f" y2="%.0f" stroke="#bbb"/>`+"\n",
		left, top+10, inUnit(most, p.unit), left, top+height, left+width, top+height)
	if most == 0 || last == first {
		return
	}
	for i, l := range slices.Backward(p.lines) {
		var points []string
		for _, v := range l.values {
			x, y := left+width*(v[0]-first)/(last-first), top+height-(height-14)*v[1]/most
			points = append(points, fmt.Sprintf("%.1f,%.1f", x, y))
		}
		fmt.Fprintf(b, `<polyline fill="none" stroke="%s" stroke-width="1.5" points="%s"/>`+"\n",
			colours[i%len(colours)], strings.Join(points, " "))
	}
}

// inUnit formats a value in a unit of Grafana.
func inUnit(v float64, unit string) string {
	switch {
	case unit == "bytes":
		return fmt.Sprintf("%.1f MiB", v/(1<<20))
	case unit == "percentunit":
		return fmt.Sprintf("%.0f %%", 100*v)
	case unit == "ops":
		return fmt.Sprintf("%.1f/s", v)
	case unit == "s" && v > 2*86400:
		return fmt.Sprintf("%.0f d", v/86400)
	case unit == "s" && v < 1:
		return fmt.Sprintf("%.1f ms", 1000*v)
	case unit == "s":
		return fmt.Sprintf("%.0f s", v)
	}
	return fmt.Sprintf("%.3g", v)
}
