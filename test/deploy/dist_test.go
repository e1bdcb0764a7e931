package deploy

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"debug/macho"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

const (
	distVersion = "v9.8.7"
	distImage   = "registry.example.org/hook:" + distVersion + "@sha256:0123"
)

// dist makes a release, and returns its files by name.
func dist(t *testing.T) map[string][]byte {
	t.Helper()
	if _, err := exec.LookPath("kubectl"); err != nil {
		t.Skip("kubectl, which has kustomize, is not installed")
	}
	folder := t.TempDir()
	run := exec.Command("make", "-C", rig.Root(), "dist", "DIST="+folder, "VERSION="+distVersion, "RELEASE_IMAGE="+distImage)
	if out, err := run.CombinedOutput(); err != nil {
		t.Fatalf("make dist: %v\n%s", err, out)
	}
	files := map[string][]byte{}
	entries, err := os.ReadDir(folder)
	rig.Must(t, err)
	for _, entry := range entries {
		text, err := os.ReadFile(filepath.Join(folder, entry.Name()))
		rig.Must(t, err)
		files[entry.Name()] = text
	}
	return files
}

// A release has the files that the documents name, and each of them is whole.
func TestDist(t *testing.T) {
	rig.SkipSlow(t, "make test-dist")
	files := dist(t)
	kinds := map[string][]string{ // of the objects in a manifest, some of them
		"install.yaml":                 {"Namespace", "Deployment", "MutatingWebhookConfiguration", "ConfigMap"},
		"gate.yaml":                    {"Deployment", "ServiceAccount", "ClusterRole"},
		"status.yaml":                  {"Deployment", "ServiceAccount", "NetworkPolicy"},
		"etcd.yaml":                    {"Namespace", "Deployment", "MutatingWebhookConfiguration", "StatefulSet"},
		"monitoring.yaml":              {"PodMonitor", "PrometheusRule"},
		"cert-manager.yaml":            {"Certificate", "Issuer"},
		"example-job.yaml":             {"Job"},
		"example-statefulset.yaml":     {"StatefulSet"},
		"example-two-deployments.yaml": {"Deployment"},
	}
	if hasSentinel() {
		kinds["sentinel.yaml"] = []string{"Namespace", "Deployment", "MutatingWebhookConfiguration", "StatefulSet"}
	}
	for name, want := range kinds {
		got := kindsOf(t, name, files[name])
		for _, kind := range want {
			if !slices.Contains(got, kind) {
				t.Errorf("%s has no %s, only %q", name, kind, got)
			}
		}
	}
	images := map[string]int{"install.yaml": 2, "etcd.yaml": 2, "sentinel.yaml": 2, "gate.yaml": 1, "status.yaml": 1}
	for name, least := range images {
		text := string(files[name])
		if kinds[name] != nil && strings.Count(text, distImage+"\n") < least {
			t.Errorf("%s names the image less than %d times", name, least)
		}
		if strings.Contains(text, "at-least-semaphore-pod-hook:v") {
			t.Errorf("%s names an image of another version", name)
		}
	}
	for _, platform := range []string{"linux-amd64", "linux-arm64", "darwin-amd64", "darwin-arm64"} {
		checkProgram(t, platform, files["at-least-semaphore-pod-hook-"+platform])
	}
	for _, text := range []string{"at-least-semaphore-pod-hook\n", "The Go runtime", "github.com/gomodule/redigo v"} {
		if !bytes.Contains(files["licences.txt"], []byte(text)) {
			t.Errorf("licences.txt has no %q", text)
		}
	}
	if !bytes.Equal(files["rules.yaml"], []byte(rig.ReadFile(t, "deploy/monitoring/rules.yaml"))) {
		t.Error("rules.yaml is not that of deploy/monitoring")
	}
	alert := []byte("- alert: ")
	if got, want := bytes.Count(files["monitoring.yaml"], alert), bytes.Count(files["rules.yaml"], alert); got != want || want == 0 {
		t.Errorf("monitoring.yaml has %d of the %d alerts of rules.yaml", got, want)
	}
	checkSums(t, files)
	checkDocuments(t, files)
}

func hasSentinel() bool {
	_, err := os.Stat(rig.Path("deploy/sentinel"))
	return err == nil
}

// kindsOf returns the kinds of the objects in a manifest, as kustomize reads it.
func kindsOf(t *testing.T, name string, text []byte) []string {
	t.Helper()
	folder := t.TempDir()
	rig.Must(t, os.WriteFile(filepath.Join(folder, name), text, 0o600))
	rig.Must(t, os.WriteFile(filepath.Join(folder, "kustomization.yaml"), []byte("resources: ["+name+"]\n"), 0o600))
	out, err := exec.Command("kubectl", "kustomize", folder).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v: %s", name, err, out)
	}
	var kinds []string
	for _, m := range regexp.MustCompile(`(?m)^kind: (\w+)$`).FindAllStringSubmatch(string(out), -1) {
		kinds = append(kinds, m[1])
	}
	return kinds
}

// checkProgram checks that a program is a static one for its platform, and is built as
// the program in the image.
func checkProgram(t *testing.T, platform string, program []byte) {
	t.Helper()
	system, architecture, _ := strings.Cut(platform, "-")
	info, err := buildinfo.Read(bytes.NewReader(program))
	if err != nil {
		t.Errorf("%s: %v", platform, err)
		return
	}
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	for key, want := range map[string]string{"GOOS": system, "GOARCH": architecture, "CGO_ENABLED": "0",
		"-tags": "grpcnotrace", "-trimpath": "true", "vcs.revision": ""} {
		if settings[key] != want {
			t.Errorf("%s: the setting %s is %q, want %q", platform, key, settings[key], want)
		}
	}
	if system == "darwin" {
		file, err := macho.NewFile(bytes.NewReader(program))
		if want := map[string]macho.Cpu{"amd64": macho.CpuAmd64, "arm64": macho.CpuArm64}[architecture]; err != nil || file.Cpu != want {
			t.Errorf("%s: %v, %v; want %s", platform, file, err, want)
		}
		return
	}
	file, err := elf.NewFile(bytes.NewReader(program))
	if want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[architecture]; err != nil || file.Machine != want {
		t.Errorf("%s: %v, %v; want %s", platform, file, err, want)
		return
	}
	if libraries, err := file.ImportedLibraries(); err == nil && len(libraries) > 0 {
		t.Errorf("%s needs %q", platform, libraries)
	}
	if platform != runtime.GOOS+"-"+runtime.GOARCH {
		return
	}
	path := filepath.Join(t.TempDir(), "program")
	rig.Must(t, os.WriteFile(path, program, 0o700))
	if out, err := exec.Command(path, "version").CombinedOutput(); err != nil || !strings.Contains(string(out), distVersion) {
		t.Errorf("%s version: %s, %v; want %s", platform, out, err, distVersion)
	}
}

// checkSums checks that checksums.txt has the sums of all other files.
func checkSums(t *testing.T, files map[string][]byte) {
	t.Helper()
	var want []string
	for name, text := range files {
		if name != "checksums.txt" {
			want = append(want, fmt.Sprintf("%x  %s", sha256.Sum256(text), name))
		}
	}
	got := strings.Split(strings.TrimSpace(string(files["checksums.txt"])), "\n")
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("checksums.txt has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// checkDocuments checks that the documents name files of a release only that it has.
func checkDocuments(t *testing.T, files map[string][]byte) {
	t.Helper()
	pages, err := filepath.Glob(rig.Path("docs/*.md"))
	rig.Must(t, err)
	named := regexp.MustCompile(`(?:\$release|/releases/latest/download|/releases/download/v[\d.]+)/([\w.-]+)`)
	found := 0
	for _, page := range append(pages, rig.Path("README.md")) {
		text, err := os.ReadFile(page)
		rig.Must(t, err)
		for _, m := range named.FindAllSubmatch(text, -1) {
			found++
			if name := string(m[1]); files[name] == nil && (name != "sentinel.yaml" || hasSentinel()) {
				t.Errorf("%s names %s, which no release has", filepath.Base(page), name)
			}
		}
	}
	if found == 0 {
		t.Error("the documents name no file of a release")
	}
}
