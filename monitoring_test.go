package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// prometheusServer is a real Prometheus.
type prometheusServer struct{ url string }

// startPrometheus starts one that scrapes the webhooks every second, and has the alert rules.
func startPrometheus(t *testing.T, webhooks ...*testWebhook) *prometheusServer {
	t.Helper()
	var targets []string
	for _, w := range webhooks {
		server := httptest.NewServer(w.healthRoutes())
		t.Cleanup(server.Close)
		targets = append(targets, strings.TrimPrefix(server.URL, "http://"))
	}
	rules, err := filepath.Abs("deploy/monitoring/rules.yaml")
	rig.Must(t, err)
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	rig.Must(t, os.WriteFile(config, []byte(fmt.Sprintf(`
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs: [{job_name: webhook, static_configs: [{targets: [%s]}]}]
`, rules, strings.Join(targets, ", "))), 0o600))
	address := rig.FreeAddress(t)
	c := exec.Command("prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)
	var log rig.Log
	c.Stderr = &log
	rig.Must(t, c.Start())
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
		if t.Failed() {
			t.Logf("Prometheus:\n%s", log.String())
		}
	})
	return &prometheusServer{"http://" + address}
}

// get asks Prometheus for something of its API.
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

// query returns how many series there are, and the sum of their last values.
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

// dashboardPanel is a panel of the dashboard.
type dashboardPanel struct {
	Title, Type string
	Targets     []dashboardTarget
	FieldConfig struct{ Defaults struct{ Unit string } }
}

type dashboardTarget struct{ Expr, LegendFormat string }

// query is what Grafana asks for.
func (t dashboardTarget) query() string {
	return strings.NewReplacer("$__rate_interval", "1m", "$namespace", ".*").Replace(t.Expr)
}

func readDashboard(t *testing.T) []dashboardPanel {
	t.Helper()
	text, err := os.ReadFile("deploy/monitoring/dashboard.json")
	rig.Must(t, err)
	var d struct{ Panels []dashboardPanel }
	rig.Must(t, json.Unmarshal(text, &d))
	return d.Panels
}

// ruleQueries are what the alert rules look at, without the threshold.
func ruleQueries(t *testing.T, p *prometheusServer) map[string]string {
	t.Helper()
	var data struct {
		Groups []struct {
			Rules []struct{ Name, Query, Health, LastError string }
		}
	}
	rig.Must(t, p.get("rules", nil, &data))
	queries := map[string]string{}
	for _, g := range data.Groups {
		for _, r := range g.Rules {
			if r.Health != "ok" {
				t.Errorf("%s is %s: %s", r.Name, r.Health, r.LastError)
			}
			q := regexp.MustCompile(`^absent\((.*)\)$`).ReplaceAllString(r.Query, "$1")
			q = strings.ReplaceAll(q, "offset 15m", "offset 1s")
			q, _, _ = strings.Cut(q, " > 0.5 and ")
			queries[r.Name] = regexp.MustCompile(` (>|<|==) [\d.]+( \* \d+)?$`).ReplaceAllString(q, "")
		}
	}
	return queries
}

// A real Prometheus scrapes two webhooks under load: each query of the dashboard and of the alert rules has an answer, and what both
// webhooks tell is not counted twice.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	r, _, id, _ := shownSemaphore(t, "prometheus-"+uuid.NewString()[:8])
	var webhooks []*testWebhook
	for range 2 {
		w := startWebhook(t, testConfig(r.Address))
		dir := t.TempDir()
		rig.WriteCertificate(t, dir, 1)
		w.watchCertificate(t, dir)
		webhooks = append(webhooks, w)
	}
	full, busy := semaphoreID{id.namespace, "full"}, semaphoreID{id.namespace, "busy"}
	webhooks[0].wantAdmitted(t, full, 1)
	p := startPrometheus(t, webhooks...)
	load := func() {
		for _, w := range webhooks {
			w.semaphores.giveBack(busy, w.wantAdmitted(t, busy, 5))
			w.wantFull(t, full, 1, 1)
		}
	}
	var started bool
	rig.Eventually(t, 60*time.Second, func() error {
		load()
		series, sum, err := p.query(`sum by (verdict) (rate(at_least_semaphore_admission_duration_seconds_count{verdict="full"}[1m]))`)
		if err == nil && (series != 1 || sum <= 0) {
			err = fmt.Errorf("%d series, %v", series, sum)
		}
		if err == nil && !started { // and once more, for what looks back
			started, err = true, errors.New("just started")
		}
		return err
	})
	rig.Eventually(t, 30*time.Second, func() error {
		var data struct {
			Groups []struct{ Rules []struct{ Health string } }
		}
		err := p.get("rules", nil, &data)
		for _, g := range data.Groups {
			for _, r := range g.Rules {
				if r.Health == "unknown" {
					err = errors.New("a rule was not evaluated yet")
				}
			}
		}
		return err
	})
	asked := 0
	check := func(what, query string) {
		asked++
		rig.Eventually(t, 20*time.Second, func() error {
			series, _, err := p.query(query)
			if err == nil && series == 0 {
				err = errors.New("no data")
			}
			if err != nil {
				err = fmt.Errorf("%s: %s: %w", what, query, err)
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
	if asked < 25 {
		t.Errorf("only %d queries", asked)
	}
	if _, sum, err := p.query(fmt.Sprintf("sum(max by (namespace, key) (at_least_semaphore_inflight{namespace=%q,key=%q}))", id.namespace, id.key)); err != nil || sum != 2 {
		t.Errorf("%v tokens are in use, %v; want 2", sum, err)
	}
}
