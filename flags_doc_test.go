package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// docsModes are the modes in the order of docs/flags.md. The mode await has neither flags nor a help of its own.
var docsModes = []string{"webhook", "sidecar", "gate", "status"}

// documentedSetting is a flag, or a line of environment variables, with the modes whose help has it.
type documentedSetting struct {
	name, fallback, meaning string
	modes                   []string
}

// TestFlagsDoc compares docs/flags.md with the help of each mode. REWRITE_DOCS=1 writes the page instead.
func TestFlagsDoc(t *testing.T) {
	const page = "docs/flags.md"
	want := flagsPage(t)
	if os.Getenv("REWRITE_DOCS") != "" {
		rig.Must(t, os.WriteFile(page, []byte(want), 0o644))
	}
	got, err := os.ReadFile(page)
	rig.Must(t, err)
	if string(got) == want {
		return
	}
	gotLines, wantLines := strings.Split(string(got), "\n"), strings.Split(want, "\n")
	for i := range max(len(gotLines), len(wantLines)) {
		if i >= len(gotLines) || i >= len(wantLines) || gotLines[i] != wantLines[i] {
			t.Fatalf("%s differs from --help at line %d: REWRITE_DOCS=1 go test -run TestFlagsDoc . writes it anew", page, i+1)
		}
	}
}

// flagsPage is what docs/flags.md has to say.
func flagsPage(t *testing.T) string {
	t.Helper()
	code, usage, _ := runArgs(nil, "help")
	if code != 0 {
		t.Fatalf("help: exit code %d", code)
	}
	usages := map[string]string{"await": "at-least-semaphore-pod-hook await"}
	var flags, variables []*documentedSetting
	for _, mode := range docsModes {
		code, help, _ := runArgs(nil, mode, "--help")
		head, rest, hasFlags := strings.Cut(help, "\n\nFlags:\n")
		flagLines, environment, hasEnvironment := strings.Cut(rest, "\n\nEnvironment:\n")
		if code != 0 || !hasFlags || !hasEnvironment {
			t.Fatalf("%s --help: exit code %d, %q", mode, code, help)
		}
		usages[mode] = strings.ReplaceAll(strings.TrimPrefix(head, "Usage: "), "\n       ", "\n")
		flags = addSettings(t, flags, mode, flagLines, flagInHelp)
		variables = addSettings(t, variables, mode, environment, variableInHelp)
	}

	var b strings.Builder
	b.WriteString("# Flags\n\nWhich settings does each mode have, and what are their defaults?\n\n" +
		"`--help` of each mode prints what this page says. The installation sets the flags in\n" +
		"`deploy/base/settings.yaml`: see [install.md](install.md#settings).\n" +
		"The webhook passes the sidecars the flags that they need.\n\n" +
		"At start, the program refuses wrong values, names all of them, and exits with code 2.\n\n" +
		"A test writes this page: `REWRITE_DOCS=1 go test -run TestFlagsDoc .`\n\n" +
		"```\n" + strings.TrimSpace(usage) + "\n```\n\n## Flags of several modes\n\n")
	for _, f := range flags {
		if len(f.modes) > 1 {
			b.WriteString(f.entry())
		}
	}
	for _, mode := range slices.Insert(slices.Clone(docsModes), 2, "await") {
		fmt.Fprintf(&b, "\n## %s\n\n```\n%s\n```\n", mode, usages[mode])
		if mode == "await" {
			b.WriteString("\nIt takes no flags. It reads `POD_UID` and asks the sidecar of that pod.\n")
			continue
		}
		b.WriteString("\n")
		for _, f := range flags {
			if slices.Equal(f.modes, []string{mode}) {
				b.WriteString(f.entry())
			}
		}
	}
	b.WriteString("\n## Environment\n\nSecrets come from the environment only, never from flags.\n\n")
	for _, v := range variables {
		if len(v.modes) == 1 {
			v.meaning += ". Mode: " + v.modes[0]
		}
		b.WriteString(v.entry())
	}
	return b.String()
}

var (
	// A flag in the help: its name and placeholder, and below them its meaning, with the default at the end.
	flagInHelp = regexp.MustCompile(`^  (-\S+ \S+)\n +(.*?)(?: \(default (.*)\))?$`)

	// Variables in the help: their names, and beside or below them their meaning.
	variableInHelp = regexp.MustCompile(`^  ([A-Z_]+(?:, [A-Z_]+)*)(?: +|\n +)(.*)()$`)

	// The beginning of an entry; its lines are indented further.
	entryInHelp = regexp.MustCompile(`(?m)^  \S`)
)

// addSettings reads the entries of a part of a mode's help. Those that other modes have, too, get one more mode.
func addSettings(t *testing.T, settings []*documentedSetting, mode, text string, pattern *regexp.Regexp) []*documentedSetting {
	t.Helper()
	text = strings.TrimRight(text, "\n")
	starts := entryInHelp.FindAllStringIndex(text, -1)
	for i, start := range starts {
		end := len(text)
		if i+1 < len(starts) {
			end = starts[i+1][0] - 1
		}
		m := pattern.FindStringSubmatch(text[start[0]:end])
		if m == nil {
			t.Fatalf("%s --help: cannot read %q", mode, text[start[0]:end])
		}
		found := documentedSetting{name: m[1], fallback: strings.Replace(m[3], ":"+version, ":VERSION", 1)}
		_, placeholder, _ := strings.Cut(m[1], " ")
		found.meaning = strings.TrimPrefix(m[2], placeholder+": ")
		same := slices.IndexFunc(settings, func(s *documentedSetting) bool {
			return s.name == found.name && s.fallback == found.fallback && s.meaning == found.meaning
		})
		if same < 0 {
			same = len(settings)
			settings = append(settings, &found)
		}
		settings[same].modes = append(settings[same].modes, mode)
	}
	return settings
}

// entry is how the page shows a setting.
func (s *documentedSetting) entry() string {
	text := fmt.Sprintf("- `%s`: %s.", strings.ReplaceAll(s.name, ", ", "`, `"), s.meaning)
	if s.fallback != "" {
		text += fmt.Sprintf(" Default: `%s`.", s.fallback)
	}
	if len(s.modes) > 1 {
		text += fmt.Sprintf(" Modes: %s.", strings.Join(s.modes, ", "))
	}
	return text + "\n"
}

// documents are all pages that people read.
func documents(t *testing.T) []string {
	t.Helper()
	pages, err := filepath.Glob("docs/*.md")
	rig.Must(t, err)
	if len(pages) < 10 {
		t.Fatalf("only %d pages in docs/: %q", len(pages), pages)
	}
	return append(pages, "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
}

// Documents stay short enough to be read, and begin with the question that they answer.
func TestDocsAreShort(t *testing.T) {
	const mostOfPage, mostOfReadme, mostLinesOfChangelog, mostOfCell = 15360, 9216, 40, 160
	link := regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
	for _, page := range documents(t) {
		text, err := os.ReadFile(page)
		rig.Must(t, err)
		most := mostOfPage
		if page == "README.md" {
			most = mostOfReadme
		}
		if len(text) > most {
			t.Errorf("%s has %d bytes, at most %d are allowed", page, len(text), most)
		}
		if n := strings.Count(string(text), "\n"); page == "CHANGELOG.md" && n > mostLinesOfChangelog {
			t.Errorf("%s has %d lines, at most %d are allowed", page, n, mostLinesOfChangelog)
		}
		if lines := strings.Split(string(text), "\n"); strings.HasPrefix(page, "docs/") && (len(lines) < 3 || !strings.Contains(lines[2], "?")) {
			t.Errorf("%s does not begin with the question that it answers", page)
		}
		for n, line := range strings.Split(withoutCode(string(text)), "\n") {
			if !strings.HasPrefix(line, "|") {
				continue
			}
			for cell := range strings.SplitSeq(strings.ReplaceAll(line, `\|`, "/"), "|") {
				if cell = strings.TrimSpace(link.ReplaceAllString(cell, "$1")); len(cell) > mostOfCell {
					t.Errorf("%s:%d: a cell has %d characters, at most %d are allowed: %s", page, n+1, len(cell), mostOfCell, cell)
				}
			}
		}
	}
}

// Links to pages, to their sections and to files of the repository lead somewhere.
func TestDocsLinksResolve(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	checked := 0
	for _, page := range documents(t) {
		text, err := os.ReadFile(page)
		rig.Must(t, err)
		for _, m := range link.FindAllStringSubmatch(withoutCode(string(text)), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			checked++
			name, section, hasSection := strings.Cut(m[1], "#")
			target := page
			if name != "" {
				target = filepath.Join(filepath.Dir(page), name)
			}
			linked, err := os.Stat(target)
			if err != nil {
				t.Errorf("%s links to %s: %v", page, m[1], err)
				continue
			}
			if hasSection && (linked.IsDir() || !slices.Contains(sectionsOf(t, target), section)) {
				t.Errorf("%s links to %s: there is no such section", page, m[1])
			}
		}
	}
	if checked < 20 {
		t.Errorf("only %d links were checked", checked)
	}
}

// withoutCode is a page whose blocks of code have empty lines.
func withoutCode(text string) string {
	inCode := false
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		fence := strings.HasPrefix(strings.TrimSpace(line), "```")
		if fence || inCode {
			lines[i] = ""
		}
		inCode = inCode != fence
	}
	return strings.Join(lines, "\n")
}

// sectionsOf are the names by which links reach the headings of a page, as GitHub makes them.
func sectionsOf(t *testing.T, page string) (sections []string) {
	t.Helper()
	text, err := os.ReadFile(page)
	rig.Must(t, err)
	other := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	for line := range strings.SplitSeq(withoutCode(string(text)), "\n") {
		level := strings.IndexFunc(line, func(r rune) bool { return r != '#' })
		if level > 0 && line[level] == ' ' {
			heading := other.ReplaceAllString(strings.ToLower(strings.TrimSpace(line[level:])), "")
			sections = append(sections, strings.ReplaceAll(heading, " ", "-"))
		}
	}
	return sections
}
