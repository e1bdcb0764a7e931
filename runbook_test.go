package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// messagesOf are the messages that the program logs at level WARN or above, or the beginnings of them.
func messagesOf(t *testing.T) (messages []string) {
	t.Helper()
	files, err := filepath.Glob("*.go")
	rig.Must(t, err)
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		rig.Must(t, err)
		messages = append(messages, messagesIn(t, parsed)...)
	}
	return messages
}

func messagesIn(t *testing.T, file *ast.File) (messages []string) {
	t.Helper()
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok || len(call.Args) == 0 {
			return true
		}
		method, ok := call.Fun.(*ast.SelectorExpr)
		if !ok || method.Sel.Name != "Warn" && method.Sel.Name != "Error" {
			return true
		}
		if of, ok := method.X.(*ast.Ident); ok && of.Name == "http" {
			return true
		}
		first := call.Args[0]
		for {
			sum, ok := first.(*ast.BinaryExpr)
			if !ok {
				break
			}
			first = sum.X
		}
		text, ok := first.(*ast.BasicLit)
		if !ok {
			t.Errorf("a message that is no literal: %v", first)
			return true
		}
		message, err := strconv.Unquote(text.Value)
		rig.Must(t, err)
		messages = append(messages, message)
		return true
	})
	return messages
}

// Each alert and each message of level WARN and above is in the runbook, and no alert is there that does not exist.
func TestRunbookIsWhole(t *testing.T) {
	runbook, err := os.ReadFile("docs/runbook.md")
	rig.Must(t, err)
	rules, err := os.ReadFile("deploy/monitoring/rules.yaml")
	rig.Must(t, err)
	alerts := regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(string(rules), -1)
	headings := regexp.MustCompile(`(?m)^### (\w+)$`).FindAllStringSubmatch(string(runbook), -1)
	if len(alerts) == 0 || len(alerts) != len(headings) {
		t.Errorf("%d alerts and %d headings", len(alerts), len(headings))
	}
	for i := range min(len(alerts), len(headings)) {
		if alerts[i][1] != headings[i][1] {
			t.Errorf("alert %d is %s, and its heading %s", i+1, alerts[i][1], headings[i][1])
		}
	}
	messages := messagesOf(t)
	if len(messages) < 15 {
		t.Errorf("only %d messages were found: %q", len(messages), messages)
	}
	for _, m := range messages {
		// What follows a colon may be cut off.
		beginning, _, _ := strings.Cut(m, ": unless")
		if !strings.Contains(string(runbook), "`"+beginning) {
			t.Errorf("not in docs/runbook.md: %s", m)
		}
	}
}

// The alert rules do what their tests say, and ask for metrics that there are.
func TestAlertRules(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", "deploy/monitoring/rules.yaml"}, {"test", "rules", "deploy/monitoring/rules_test.yaml"}} {
		if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	w := startWebhook(t, testConfig(rig.CommonRedis(t).Address))
	w.wantAdmitted(t, freshID(), 1)
	dir := t.TempDir()
	rig.WriteCertificate(t, dir, 1)
	w.watchCertificate(t, dir)
	scraped := w.scrape(t)
	there := func(name string, labels ...string) bool {
		for sample := range scraped {
			found := sample == name || strings.HasPrefix(sample, name+"{")
			for _, l := range labels {
				found = found && strings.Contains(sample, l)
			}
			if found {
				return true
			}
		}
		return false
	}
	rules, err := os.ReadFile("deploy/monitoring/rules.yaml")
	rig.Must(t, err)
	asked := regexp.MustCompile(metricsPrefix+`\w+(\{\w+="[^"]*"\})?`).FindAllString(string(rules), -1)
	if len(asked) < 7 {
		t.Errorf("the rules ask for %q only", asked)
	}
	for _, a := range asked {
		name, labels, _ := strings.Cut(strings.TrimSuffix(a, "}"), "{")
		if !there(name, labels) {
			t.Errorf("no metric %s", a)
		}
	}
	alternatives := regexp.MustCompile(`(\w+)[=!]~"([^"]*)"`).FindAllStringSubmatch(string(rules), -1)
	for _, a := range alternatives {
		for value := range strings.SplitSeq(a[2], "|") {
			if !anySample(scraped, a[1]+`="`+value+`"`) {
				t.Errorf("no metric has %s=%q", a[1], value)
			}
		}
	}
}

// anySample reports whether a sample has that label.
func anySample(s samples, label string) bool {
	for sample := range s {
		if strings.Contains(sample, label) {
			return true
		}
	}
	return false
}
