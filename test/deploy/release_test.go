package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// The notes of a release are its section of the changelog.
func TestNotesOfRelease(t *testing.T) {
	file := filepath.Join(t.TempDir(), "CHANGELOG.md")
	rig.Must(t, os.WriteFile(file, []byte("# Changelog\n\n## v1.10.0\n\n- a\n\n### b\n\n- c\n\n## v1.1.0 (unreleased)\n\n"+
		"- d\n\n## v1.0.0\n"), 0o600))
	for version, want := range map[string]string{
		"v1.10.0": "- a\n\n### b\n\n- c\n\n", "v1.1.0": "- d\n\n", "v1.1": "", "v1.0.0": "", "v2.0.0": "",
	} {
		out, err := exec.Command(rig.Path(".ci/changes"), version, file).Output()
		if string(out) != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v; want %q", version, out, err, want)
		}
	}
	if out, err := exec.Command(rig.Path(".ci/changes"), "v0.1.0").CombinedOutput(); err != nil {
		t.Errorf("CHANGELOG.md: %v: %s", err, out)
	}
}

// All workflows name the actions of others by commit, with the version beside it: a tag can
// move. The image is built from images that are named by digest.
func TestBuildsArePinned(t *testing.T) {
	action := regexp.MustCompile(`(?m)^ *(?:- )?uses: (.*)$`)
	pinned := regexp.MustCompile(`^(\./\S+|[\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+)$`)
	files, err := filepath.Glob(rig.Path(".github/workflows/*.yaml"))
	rig.Must(t, err)
	found := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		rig.Must(t, err)
		for _, m := range action.FindAllSubmatch(text, -1) {
			found++
			if !pinned.Match(m[1]) {
				t.Errorf("%s uses %s: write OWNER/NAME@COMMIT # vX.Y.Z", filepath.Base(file), m[1])
			}
		}
	}
	if found < 10 {
		t.Errorf("only %d uses of actions were found", found)
	}
	from := regexp.MustCompile(`(?m)^FROM (.*)$`).FindAllStringSubmatch(rig.ReadFile(t, "Dockerfile"), -1)
	if len(from) != 2 {
		t.Errorf("%d images, want 2", len(from))
	}
	for _, m := range from {
		if !regexp.MustCompile(`:\S+@sha256:[0-9a-f]{64}( AS \w+)?$`).MatchString(m[1]) {
			t.Errorf("FROM %s: write NAME:TAG@sha256:DIGEST", m[1])
		}
	}
}
