//go:build chaos || upgrade

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// edit is what is once in a file of this program, and what takes its place.
type edit struct{ file, from, to string }

// buildBroken builds the program with texts that are replaced.
func buildBroken(t *testing.T, edits []edit) (program string) {
	t.Helper()
	dir := t.TempDir()
	replace := map[string]string{}
	for _, e := range edits {
		source, err := os.ReadFile(e.file)
		must(t, err)
		if n := strings.Count(string(source), e.from); n != 1 {
			t.Fatalf("%q is %d times in %s", e.from, n, e.file)
		}
		path, err := filepath.Abs(e.file)
		must(t, err)
		replace[path] = filepath.Join(dir, filepath.Base(e.file))
		must(t, os.WriteFile(replace[path], []byte(strings.Replace(string(source), e.from, e.to, 1)), 0o600))
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	must(t, err)
	file := filepath.Join(dir, "overlay.json")
	program = filepath.Join(dir, "program")
	must(t, os.WriteFile(file, overlay, 0o600))
	must(t, build(program, "-overlay", file))
	return program
}
