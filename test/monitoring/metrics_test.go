package monitoring

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const metricsPage = "docs/operate.md"

// documentedMetrics returns the metrics in the table of docs/operate.md, as
// NAME{LABEL,...}, each with the services that alone have it: "" if the table does not
// restrict it.
func documentedMetrics(t *testing.T) map[string]string {
	t.Helper()
	code, only := regexp.MustCompile("`([^`]*)`"), regexp.MustCompile(`^ on (\w+): `)
	word := regexp.MustCompile(`\w+`)
	metrics := map[string]string{}
	for line := range strings.Lines(rig.ReadFile(t, metricsPage)) {
		cells := strings.Split(line, "|")
		if len(cells) != 4 || !strings.HasPrefix(cells[1], " `*_") {
			continue
		}
		var names []string
		labels := "" // of the names before it
		for _, m := range code.FindAllStringSubmatch(cells[1], -1) {
			if strings.HasPrefix(m[1], "{") {
				labels = m[1]
			} else if name, ours := strings.CutPrefix(m[1], "*"); ours {
				names = append(names, "at_least_semaphore"+name)
			}
		}
		service := ""
		if m := only.FindStringSubmatch(cells[2]); m != nil {
			service = m[1]
		}
		for _, name := range names {
			name, own, _ := strings.Cut(name, "{")
			metrics[withLabels(name, word.FindAllString(cmp.Or(own, labels), -1))] = service
		}
	}
	if len(metrics) < 25 {
		t.Fatalf("only %d metrics are in the table of %s", len(metrics), metricsPage)
	}
	return metrics
}

func withLabels(name string, labels []string) string {
	slices.Sort(labels)
	return name + "{" + strings.Join(labels, ",") + "}"
}

// exportedMetrics returns the metrics of a service, as NAME{LABEL,...}, without those of Go
// and of the process.
func exportedMetrics(t *testing.T, s *rig.Service) map[string]bool {
	t.Helper()
	histogram := map[string]bool{}
	text := s.Metrics(t)
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+) histogram$`).FindAllStringSubmatch(text, -1) {
		histogram[m[1]] = true
	}
	sample := regexp.MustCompile(`(?m)^(at_least_semaphore_\w+)(?:\{(.*)\})? \S+$`)
	label := regexp.MustCompile(`(\w+)="`)
	part := regexp.MustCompile(`_(bucket|sum|count)$`)
	metrics := map[string]bool{}
	for _, m := range sample.FindAllStringSubmatch(text, -1) {
		name, labels := m[1], []string(nil)
		if of := part.ReplaceAllString(name, ""); histogram[of] {
			name = of
		}
		for _, l := range label.FindAllStringSubmatch(m[2], -1) {
			if l[1] != "le" {
				labels = append(labels, l[1])
			}
		}
		metrics[withLabels(name, labels)] = true
	}
	return metrics
}

// startSetup starts setup, and waits until it has made certificates.
func startSetup(t *testing.T) *rig.Service {
	t.Helper()
	api, health := rig.StartAPIServer(t), rig.FreeAddress(t)
	api.CreateConfiguration(t)
	_, status := api.Store.Namespaces.Create(&corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{Name: "at-least-semaphore-pod-hook"}})
	if status != nil {
		t.Fatal(status.Message)
	}
	s := &rig.Service{Process: rig.NewProcess(rig.Program(t), "setup", "--metrics-bind-address="+health,
		"--kubernetes-address="+api.Address, "--kubernetes-ca-file="+api.CAFile, "--kubernetes-token-file="+api.TokenFile),
		HealthURL: "http://" + health}
	s.Start(t)
	s.WantLog(t, "made") // it listens before
	rig.Eventually(t, 30*time.Second, func() error {
		if !strings.Contains(s.Metrics(t), "setup_certificate_expiry_timestamp_seconds") {
			return errors.New("setup has made no certificate yet")
		}
		return nil
	})
	return s
}

// The table of docs/operate.md has all metrics of each service, with their labels, and no
// others.
func TestMetricsAreDocumented(t *testing.T) {
	t.Parallel()
	r, id := rig.StartRedis(t), rig.FreshID()
	useSemaphore(t, r, id)
	// A service of another mode needs one more line here, with the name that the table has
	// for it.
	services := map[string]*rig.Service{
		"webhooks": &rig.StartWebhook(t, r.Address).Service,
		"setup":    startSetup(t),
		"gates":    &rig.StartGate(t, rig.StartAPIServer(t), r.Address, "--namespaces="+id.Namespace).Service,
	}
	documented := documentedMetrics(t)
	exported := map[string][]string{} // the services of each metric
	for _, name := range slices.Sorted(maps.Keys(services)) {
		for metric := range exportedMetrics(t, services[name]) {
			exported[metric] = append(exported[metric], name)
		}
	}
	var problems []string
	for metric, have := range exported {
		only, found := documented[metric]
		switch {
		case !found:
			problems = append(problems, fmt.Sprintf("%s of %s is not in the table", metric, have))
		case only != "" && !slices.Equal(have, []string{only}):
			problems = append(problems, fmt.Sprintf("%s is on %s, and the table says: on %s", metric, have, only))
		}
	}
	for metric := range documented {
		if exported[metric] == nil {
			problems = append(problems, fmt.Sprintf("%s is in the table, and no service has it", metric))
		}
	}
	slices.Sort(problems)
	for _, problem := range problems {
		t.Error(problem)
	}
}
