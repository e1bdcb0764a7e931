// Package monitoring tests deploy/monitoring and docs/runbook.md against the program: its
// metrics, its messages, and a real Prometheus.
package monitoring

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// All tests except TestDrawDashboard are quick: they run without SUITE=1.
func TestMain(m *testing.M) { os.Exit(rig.Run(m)) }

// prometheusServer is a real Prometheus.
type prometheusServer struct{ url string }

// startPrometheus starts a Prometheus with the alert rules. It scrapes the webhooks, a gate,
// and a setup every second. As the Prometheus operator does, it gives its targets the label
// "namespace"; the PodMonitor decides about labels that are there already.
func startPrometheus(t *testing.T, gate *rig.Gate, webhooks ...*rig.Webhook) *prometheusServer {
	t.Helper()
	var targets []string
	for _, s := range []*rig.Service{&gate.Service, startSetup(t)} {
		targets = append(targets, strings.TrimPrefix(s.HealthURL, "http://"))
	}
	for _, w := range webhooks {
		targets = append(targets, strings.TrimPrefix(w.HealthURL, "http://"))
	}
	honors := strings.Contains(rig.ReadFile(t, "deploy/monitoring/podmonitor.yaml"), "\n      honorLabels: true\n")
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	rig.Must(t, os.WriteFile(config, fmt.Appendf(nil, `
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
- job_name: webhook
  honor_labels: %t
  static_configs: [{targets: [%s], labels: {namespace: at-least-semaphore-pod-hook}}]
`, rig.Path(rulesFile), honors, strings.Join(targets, ", ")), 0o600))
	address := rig.FreeAddress(t)
	rig.NewProcess("prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+address).Start(t)
	return &prometheusServer{"http://" + address}
}

// get sends a request to Prometheus's API.
func (p *prometheusServer) get(path string, parameters url.Values, data any) error {
	response, err := http.Get(p.url + "/api/v1/" + path + "?" + parameters.Encode())
	if err != nil {
		return err
	}
	defer response.Body.Close()
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return errors.New(answer.Error)
	}
	return json.Unmarshal(answer.Data, data)
}

// query returns the number of series, and the sum of their last values.
func (p *prometheusServer) query(expression string) (series int, sum float64, err error) {
	var data struct {
		Result []struct{ Value [2]any }
	}
	err = p.get("query", url.Values{"query": {expression}}, &data)
	for _, r := range data.Result {
		value, _ := strconv.ParseFloat(r.Value[1].(string), 64)
		sum += value
	}
	return len(data.Result), sum, err
}

// alertRule is a rule as Prometheus reports it.
type alertRule struct{ Name, Query, Health, LastError string }

func (p *prometheusServer) rules() (rules []alertRule, err error) {
	var data struct {
		Groups []struct{ Rules []alertRule }
	}
	err = p.get("rules", nil, &data)
	for _, g := range data.Groups {
		rules = append(rules, g.Rules...)
	}
	return rules, err
}

// dashboardPanel is a panel of the dashboard.
type dashboardPanel struct {
	Title, Type string
	Targets     []dashboardTarget
	FieldConfig struct{ Defaults struct{ Unit string } }
}

type dashboardTarget struct{ Expr, LegendFormat string }

// query is the query that Grafana sends.
func (t dashboardTarget) query() string {
	return strings.NewReplacer("$__rate_interval", "1m", "$namespace", ".*").Replace(t.Expr)
}

func readDashboard(t *testing.T) []dashboardPanel {
	t.Helper()
	var d struct{ Panels []dashboardPanel }
	rig.Must(t, json.Unmarshal([]byte(rig.ReadFile(t, "deploy/monitoring/dashboard.json")), &d))
	return d.Panels
}

// ruleQueries returns the queries of the alert rules, without their thresholds.
func ruleQueries(t *testing.T, p *prometheusServer) map[string]string {
	t.Helper()
	rules, err := p.rules()
	rig.Must(t, err)
	queries := map[string]string{}
	for _, r := range rules {
		if r.Health != "ok" {
			t.Errorf("%s is %s: %s", r.Name, r.Health, r.LastError)
		}
		q := regexp.MustCompile(`^absent\((.*)\)$`).ReplaceAllString(r.Query, "$1")
		q = strings.ReplaceAll(q, "offset 15m", "offset 1s")
		q = regexp.MustCompile(` > [\d.]+( < [\d.]+)? (and|unless) .*$`).ReplaceAllString(q, "")
		queries[r.Name] = regexp.MustCompile(` (>|<|==) [\d.]+( \* \d+)?$`).ReplaceAllString(q, "")
	}
	return queries
}

// useSemaphore makes a semaphore with two holders, one of them stale, and two waiters. It
// pauses another one.
func useSemaphore(t *testing.T, r *rig.Redis, id rig.ID) {
	t.Helper()
	const length = 2
	r.Acquire(t, id, length)
	silent := r.Acquire(t, id, length)
	for _, pod := range []string{"web-c node-2", ""} {
		a, err := r.TryAcquire(id, rig.DefaultTiming, length, uuid.NewString(), "0", pod)
		if err != nil || a.Status != rig.AcquireFull {
			t.Fatalf("got %+v, %v", a, err)
		}
	}
	r.Do(t, "ZADD", id.InflightKey(), "XX", r.Now(t)-7200, silent)
	paused := rig.ID{Namespace: id.Namespace, Key: "paused"}
	_, err := r.Run("set", paused, rig.DefaultTiming, "override", 0, 3600, "db upgrade", "")
	rig.Must(t, err)
}

// A real Prometheus scrapes two webhooks under load, and a gate. Each query of the
// dashboard and of the alert rules returns data. No query counts twice what both webhooks
// report.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	const patience = 2 * time.Minute
	r, id := rig.StartRedis(t), rig.FreshID()
	useSemaphore(t, r, id)
	webhooks := []*rig.Webhook{rig.StartWebhook(t, r.Address), rig.StartWebhook(t, r.Address)}
	full, busy := rig.ID{Namespace: id.Namespace, Key: "full"}, rig.ID{Namespace: id.Namespace, Key: "busy"}
	webhooks[0].WantAdmitted(t, full, 1)
	api := rig.StartAPIServer(t)
	api.Stop() // otherwise the gate is at work, and the query of SemaphoreGateMissing has no data
	gate := rig.NewGate(t, rig.Program(t), api, r.Address)
	gate.Start(t)
	p := startPrometheus(t, gate, webhooks...)
	load := func() {
		for _, w := range webhooks {
			r.Release(t, busy, w.WantAdmitted(t, busy, 5))
			if a := w.Admit(t, rig.Review(t, full, 1)); a.Allowed || a.Code != http.StatusTooManyRequests {
				t.Fatalf("got %+v, want %d", a, http.StatusTooManyRequests)
			}
		}
	}
	var counted bool
	rig.Eventually(t, patience, func() error {
		load()
		series, sum, err := p.query(
			`sum by (verdict) (rate(at_least_semaphore_admission_duration_seconds_count{verdict="full"}[1m]))`)
		if err == nil && (series != 1 || sum <= 0) {
			err = fmt.Errorf("%d series, %v", series, sum)
		}
		if err == nil && !counted { // once more, for queries over a time range
			counted, err = true, errors.New("the load was counted only once")
		}
		return err
	})
	rig.Eventually(t, patience, func() error {
		rules, err := p.rules()
		for _, r := range rules {
			if r.Health == "unknown" {
				err = fmt.Errorf("%s was not evaluated yet", r.Name)
			}
		}
		return err
	})
	queries := 0
	check := func(of, query string) {
		queries++
		rig.Eventually(t, patience, func() error {
			series, _, err := p.query(query)
			if err == nil && series == 0 {
				err = errors.New("no data")
			}
			if err != nil {
				err = fmt.Errorf("%s: %s: %w", of, query, err)
			}
			return err
		})
	}
	for _, panel := range readDashboard(t) {
		for _, target := range panel.Targets {
			check(panel.Title, target.query())
		}
	}
	for alert, q := range ruleQueries(t, p) {
		check(alert, q)
	}
	if queries < 25 {
		t.Errorf("only %d queries", queries)
	}
	// The gate watches all namespaces, so its metric names none.
	const heard = `at_least_semaphore_gate_heard_seconds_ago{namespace=""}`
	if series, _, err := p.query(heard); err != nil || series != 1 {
		t.Errorf("%d series of %s, %v; want 1", series, heard, err)
	}
	inUse := fmt.Sprintf("sum(max by (namespace, key) (at_least_semaphore_inflight{namespace=%q,key=%q}))",
		id.Namespace, id.Key)
	if _, sum, err := p.query(inUse); err != nil || sum != 2 {
		t.Errorf("%v tokens are in use, %v; want 2", sum, err)
	}
}
