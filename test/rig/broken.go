package rig

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Edit replaces a text that occurs exactly once in a file of the program. File is its
// path from the root.
type Edit struct{ File, From, To string }

// EditedFiles returns the texts of the edited files, by their paths from the root. It fails
// the test if an edit does not apply.
func EditedFiles(t testing.TB, edits []Edit) map[string]string {
	t.Helper()
	texts := map[string]string{}
	for _, e := range edits {
		source := ReadFile(t, e.File)
		if n := strings.Count(source, e.From); n != 1 {
			t.Fatalf("%q is %d times in %s", e.From, n, e.File)
		}
		if texts[e.File] != "" {
			t.Fatalf("%s is edited twice", e.File)
		}
		texts[e.File] = strings.Replace(source, e.From, e.To, 1)
	}
	return texts
}

// BuildBroken builds the program with edits. The source files stay unchanged.
func BuildBroken(t testing.TB, edits []Edit) (program string) {
	t.Helper()
	dir := t.TempDir()
	replace := map[string]string{}
	for file, text := range EditedFiles(t, edits) {
		replace[Path(file)] = filepath.Join(dir, filepath.Base(file))
		Must(t, os.WriteFile(replace[Path(file)], []byte(text), 0o600))
	}
	overlay := filepath.Join(dir, "overlay.json")
	program = filepath.Join(dir, "program")
	Must(t, os.WriteFile(overlay, JSON(t, map[string]any{"Replace": replace}), 0o600))
	Must(t, Build(Root(), program, "-overlay", overlay))
	return program
}
