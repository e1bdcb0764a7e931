// Package deploy tests what deploy/ promises: the servers of Redis and their users, the
// rights of setup, and the memory of the webhook.
package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"k8s.io/apimachinery/pkg/api/resource"
)

// All tests are quick: they run without SUITE=1.
func TestMain(m *testing.M) { os.Exit(rig.Run(m)) }

// The Deployment gives Go half of the container's memory. Go rarely collects garbage
// below that.
func TestMemoryIsLimitedAsDeployed(t *testing.T) {
	const manifest = "deploy/base/webhook.yaml"
	text := rig.ReadFile(t, manifest)
	value := func(pattern string) string {
		found := regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1)
		if len(found) != 1 {
			t.Fatalf("%d matches of %s in %s, want 1", len(found), pattern, manifest)
		}
		return found[0][1]
	}
	forGo, err := resource.ParseQuantity(strings.TrimSuffix(value(`name: GOMEMLIMIT\n +value: (\S+)\n`), "B"))
	rig.Must(t, err)
	whole, err := resource.ParseQuantity(value(`limits: \{.*memory: (\S+)\}`))
	rig.Must(t, err)
	if 2*forGo.Value() != whole.Value() {
		t.Errorf("GOMEMLIMIT is %s: it must be half of the limit, %s", &forGo, &whole)
	}
	if percent := value(`name: GOGC\n +value: "(\d+)"\n`); percent != "400" {
		t.Errorf("GOGC is %s: it must be 400, the value behind the figures in the documents", percent)
	}
}

// The overlay in docs/install.md names the image once. It reaches webhook, gate and
// sidecars.
func TestOverlayOfTheImage(t *testing.T) {
	if _, err := exec.LookPath("kubectl"); err != nil {
		t.Skip("kubectl, which has kustomize, is not installed")
	}
	const start = "```yaml\n# deploy/own/kustomization.yaml\n"
	_, overlay, found := strings.Cut(rig.ReadFile(t, "docs/install.md"), start)
	overlay, _, ended := strings.Cut(overlay, "```")
	resources, _, hasImages := strings.Cut(overlay, "images:\n")
	if !found || !ended || !hasImages {
		t.Fatalf("docs/install.md has no %q with images", start)
	}
	folder := t.TempDir()
	rig.Must(t, os.CopyFS(filepath.Join(folder, "deploy"), os.DirFS(rig.Path("deploy"))))
	own := filepath.Join(folder, "deploy/own")
	rig.Must(t, os.Mkdir(own, 0o700))
	imagesOf := func(overlay string) []string {
		rig.Must(t, os.WriteFile(filepath.Join(own, "kustomization.yaml"), []byte(overlay), 0o600))
		out, err := exec.Command("kubectl", "kustomize", own).CombinedOutput()
		if err != nil {
			t.Fatalf("kubectl kustomize: %v\n%s", err, out)
		}
		return regexp.MustCompile(`\S+/at-least-semaphore-pod-hook:v\S+`).FindAllString(string(out), -1)
	}
	released := imagesOf(resources)
	if len(released) < 3 { // webhook, gate and sidecars
		t.Errorf("the images are %q", released)
	}
	want := slices.Repeat([]string{"registry.example.org/at-least-semaphore-pod-hook:v1"}, len(released))
	if images := imagesOf(overlay); !slices.Equal(images, want) {
		t.Errorf("the images are %q, want %q", images, want)
	}
}

// All workloads of the installation have its PriorityClass: pods with the default priority
// cannot preempt them. They cannot preempt those of the system.
func TestPriority(t *testing.T) {
	const class = "at-least-semaphore-pod-hook"
	workload := regexp.MustCompile(`(?m)^kind: (Deployment|StatefulSet|DaemonSet|Job|CronJob|Pod)$`)
	workloads := 0
	for _, folder := range []string{"deploy/base", "deploy/etcd", "deploy/gate", sentinelFolder} {
		files, err := filepath.Glob(rig.Path(folder + "/*.yaml"))
		rig.Must(t, err)
		for _, file := range files {
			text, err := os.ReadFile(file)
			rig.Must(t, err)
			want := len(workload.FindAll(text, -1))
			if got := strings.Count(string(text), "\n      priorityClassName: "+class+"\n"); got != want {
				t.Errorf("%s: %d of %d workloads have the PriorityClass", file, got, want)
			}
			workloads += want
		}
	}
	if workloads < 4 {
		t.Errorf("only %d workloads were found", workloads)
	}
	text := rig.ReadFile(t, "deploy/base/priority-class.yaml")
	value := regexp.MustCompile(`(?m)^  name: ` + class + `\nvalue: (\d+)$`).FindStringSubmatch(text)
	if value == nil {
		t.Fatalf("no value in %s", text)
	}
	const highestOfUsers = 1000000000 // Kubernetes accepts no more from users
	if n, err := strconv.Atoi(value[1]); err != nil || n <= 0 || n > highestOfUsers {
		t.Errorf("the value is %s", value[1])
	}
}

// kustomize builds the overlays in the documents.
func TestOverlaysOfDocuments(t *testing.T) {
	if _, err := exec.LookPath("kubectl"); err != nil {
		t.Skip("kubectl, which has kustomize, is not installed")
	}
	t.Parallel()
	folder := t.TempDir()
	rig.Must(t, os.CopyFS(filepath.Join(folder, "deploy"), os.DirFS(rig.Path("deploy"))))
	overlay := regexp.MustCompile("(?ms)^( *)```yaml\n *# (deploy/[a-z-]+)/kustomization.yaml\n(.*?)^ *```$")
	pages, err := filepath.Glob(rig.Path("docs/*.md"))
	rig.Must(t, err)
	found := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		rig.Must(t, err)
		for _, m := range overlay.FindAllStringSubmatch(string(text), -1) {
			found++
			indent, path := m[1], m[2]
			rig.Must(t, os.Mkdir(filepath.Join(folder, path), 0o700))
			rig.Must(t, os.WriteFile(filepath.Join(folder, path, "kustomization.yaml"),
				[]byte(strings.ReplaceAll("\n"+m[3], "\n"+indent, "\n")), 0o600))
			if out, err := exec.Command("kubectl", "kustomize", filepath.Join(folder, path)).CombinedOutput(); err != nil {
				t.Errorf("%s in %s: %v\n%s", path, filepath.Base(page), err, out)
			}
		}
	}
	if found < 2 {
		t.Errorf("only %d overlays were found", found)
	}
}
