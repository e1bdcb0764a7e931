package monitoring

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const rulesFile = "deploy/monitoring/rules.yaml"

// messages returns the messages that the program logs at level WARN and above, or their
// beginnings.
func messages(t *testing.T) (all []string) {
	t.Helper()
	files, err := filepath.Glob(rig.Path("*.go"))
	rig.Must(t, err)
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		rig.Must(t, err)
		all = append(all, messagesIn(t, parsed)...)
	}
	return all
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

// The runbook has each alert, and no other. docs/messages.md has each message of level WARN
// and above.
func TestRunbookIsComplete(t *testing.T) {
	runbook, rules := rig.ReadFile(t, "docs/runbook.md"), rig.ReadFile(t, rulesFile)
	pageOfMessages := rig.ReadFile(t, "docs/messages.md")
	alerts := regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(rules, -1)
	headings := regexp.MustCompile(`(?m)^### (\w+)$`).FindAllStringSubmatch(runbook, -1)
	if len(alerts) == 0 || len(alerts) != len(headings) {
		t.Errorf("%d alerts and %d headings", len(alerts), len(headings))
	}
	for i := range min(len(alerts), len(headings)) {
		if alerts[i][1] != headings[i][1] {
			t.Errorf("alert %d is %s, and its heading %s", i+1, alerts[i][1], headings[i][1])
		}
	}
	logged := messages(t)
	if len(logged) < 15 {
		t.Errorf("only %d messages were found: %q", len(logged), logged)
	}
	for _, m := range logged {
		// The page may cut off the text after a colon.
		beginning, _, _ := strings.Cut(m, ": unless")
		if !strings.Contains(pageOfMessages, "`"+beginning) {
			t.Errorf("not in docs/messages.md: %s", m)
		}
	}
}

// promtool runs a check, which must succeed, and returns its output.
func promtool(t *testing.T, stdin string, args ...string) (out string) {
	t.Helper()
	cmd := exec.Command("promtool", args...)
	cmd.Stdin = strings.NewReader(stdin)
	text, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, text)
	}
	return string(text)
}

// The alert rules pass their tests. The program has each metric and label value in them.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	promtool(t, "", "check", "rules", rig.Path(rulesFile))
	promtool(t, "", "test", "rules", rig.Path("deploy/monitoring/rules_test.yaml"))
	w := rig.StartWebhook(t, rig.CommonRedis(t).Address)
	w.WantAdmitted(t, rig.FreshID(), 1)
	gate := rig.StartGate(t, rig.StartAPIServer(t), rig.CommonRedis(t).Address)
	var scraped string
	for _, s := range []*rig.Service{&w.Service, &gate.Service, startSetup(t)} {
		text := s.Metrics(t)
		if out := promtool(t, text, "check", "metrics"); out != "" {
			t.Errorf("promtool check metrics: %s", out)
		}
		scraped += text
	}
	var series []string // NAME or NAME{LABELS}
	for line := range strings.Lines(scraped) {
		if !strings.HasPrefix(line, "#") {
			series = append(series, line[:strings.LastIndexByte(line, ' ')])
		}
	}
	exists := func(name, label string) bool {
		for _, s := range series {
			if (name == "" || s == name || strings.HasPrefix(s, name+"{")) && strings.Contains(s, label) {
				return true
			}
		}
		return false
	}
	rules := rig.ReadFile(t, rulesFile)
	named := regexp.MustCompile(`at_least_semaphore_\w+(\{\w+="[^"]*"\})?`).FindAllString(rules, -1)
	if len(named) < 7 {
		t.Errorf("the rules name only %q", named)
	}
	for _, n := range named {
		name, label, _ := strings.Cut(strings.TrimSuffix(n, "}"), "{")
		if !exists(name, label) {
			t.Errorf("no metric %s", n)
		}
	}
	alternatives := regexp.MustCompile(`(\w+)[=!]~"([^"]*)"`).FindAllStringSubmatch(rules, -1)
	for _, a := range alternatives {
		for value := range strings.SplitSeq(a[2], "|") {
			if !exists("", a[1]+`="`+value+`"`) {
				t.Errorf("no metric has %s=%q", a[1], value)
			}
		}
	}
}
