package upgrade

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// programBuild is a build of the program. A webhook or the containers of a pod run it.
type programBuild struct {
	image string // in pods
	path  string
}

// programBefore builds the program of the last release, or of HEAD if there is none.
// folder has the files of that commit.
func programBefore(t *testing.T) (b programBuild, folder string, released bool) {
	t.Helper()
	commit, released, err := commitBefore()
	rig.Must(t, err)
	t.Logf("the program before is that of %s", commit)
	folder = t.TempDir()
	rig.Must(t, export(commit, folder))
	b = programBuild{"example.org/sidecar:before", filepath.Join(t.TempDir(), "before")}
	rig.Must(t, rig.Build(folder, b.path))
	return b, folder, released
}

// programNow returns the program of this folder.
func programNow(t *testing.T) programBuild {
	t.Helper()
	return programBuild{"example.org/sidecar:now", rig.Program(t)}
}

// git runs git in this repository.
func git(args ...string) (string, error) {
	var errText bytes.Buffer
	c := gitCommand(&errText, args...)
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, errText.String())
	}
	return strings.TrimSpace(string(out)), err
}

func gitCommand(errText io.Writer, args ...string) *exec.Cmd {
	c := exec.Command("git", args...)
	c.Dir, c.Stderr = rig.Root(), errText
	return c
}

// commitBefore returns the last release before HEAD, or HEAD if there is none.
func commitBefore() (commit string, released bool, err error) {
	const help = "this test needs the history of the repository, with its tags: "
	shallow, err := git("rev-parse", "--is-shallow-repository")
	if err != nil {
		return "", false, fmt.Errorf(help+"clone it with git, and run the test there: %w", err)
	}
	if shallow == "true" {
		return "", false, errors.New(help + "git fetch --unshallow --tags (fetch-depth: 0 of actions/checkout)")
	}
	tags, err := git("for-each-ref", "--merged=HEAD", "--no-contains=HEAD", "--sort=-version:refname",
		"--format=%(refname:short)", "refs/tags/v*")
	if err != nil {
		return "", false, err
	}
	if tags == "" {
		return "HEAD", false, nil
	}
	return strings.Fields(tags)[0], true, nil
}

// export writes the files of a commit into a folder.
func export(commit, folder string) error {
	var errText bytes.Buffer
	archive := gitCommand(&errText, "archive", "--format=tar", commit)
	out, err := archive.StdoutPipe()
	if err == nil {
		err = archive.Start()
	}
	if err == nil {
		err = errors.Join(untar(out, folder), archive.Wait())
	}
	if err != nil {
		return fmt.Errorf("git archive %s: %w: %s", commit, err, errText.String())
	}
	return nil
}

func untar(from io.Reader, folder string) error {
	for files := tar.NewReader(from); ; {
		file, err := files.Next()
		if err == io.EOF {
			_, err = io.Copy(io.Discard, from)
			return err
		}
		if err != nil {
			return err
		}
		name := filepath.Join(folder, filepath.FromSlash(file.Name))
		switch file.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(name, 0o755)
		case tar.TypeReg:
			var text []byte
			if text, err = io.ReadAll(files); err == nil {
				err = os.WriteFile(name, text, fs.FileMode(file.Mode)&0o777)
			}
		}
		if err != nil {
			return err
		}
	}
}

func usersOf(t *testing.T, build programBuild, namespace string) (queue, lock []string) {
	t.Helper()
	api := rig.StartAPIServer(t)
	for name, open := range map[string]string{"at-least-semaphore-pod-hook": "false", namespace: "true"} {
		n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
			"at-least-semaphore-pod-hook.kaidotio.github.io/sidecars": open}}}
		if _, status := api.Store.Namespaces.Create(n); status != nil {
			t.Fatal(status.Message)
		}
	}
	setup := rig.NewProcess(build.path, "setup", "--webhook-certificate=given", "--metrics-bind-address="+rig.FreeAddress(t),
		"--user-redis-addresses="+rig.FreeAddress(t), "--user-lock-addresses="+rig.FreeAddress(t), // no server is there
		"--kubernetes-address="+api.Address, "--kubernetes-ca-file="+api.CAFile, "--kubernetes-token-file="+api.TokenFile)
	setup.Start(t)
	read := func(file string) (args []string) {
		args = strings.Fields("--user default on resetpass ~* &* +@all --user tester on >" + rig.Password + " ~* &* +@all")
		rig.Eventually(t, patience, func() error {
			s, missing := api.Store.Secrets.Get("at-least-semaphore-pod-hook", "redis-users")
			if missing != nil {
				return errors.New(missing.Message)
			}
			found := 0
			for line := range strings.Lines(string(s.Data[file])) {
				words := strings.Fields(line)
				if user := words[1]; user == "webhook" || user == "sidecar/"+namespace {
					args = append(args, "--user", user, ">"+rig.Password)
					args = append(args, words[2:]...)
					found++
				}
			}
			if found != 2 {
				return fmt.Errorf("%s has %d of 2 users:\n%s", file, found, s.Data[file])
			}
			return nil
		})
		return args
	}
	queue, lock = read("users.acl"), read("locks.acl")
	setup.Kill()
	return queue, lock
}

// startRedis starts a redis-server with users.
func startRedis(t *testing.T, users []string) *rig.Redis {
	t.Helper()
	return rig.StartRedisWith(t, rig.RedisOptions{
		Args: func(port string) []string { return append(rig.PlainPort(port), users...) },
		Dial: []redis.DialOption{redis.DialUsername("tester"), redis.DialPassword(rig.Password)},
		Kind: rig.SingleQueue,
		Bare: true, // webhooks load the scripts
	})
}

// luaFiles returns the texts of the scripts in a folder, by file name.
func luaFiles(t *testing.T, folder string) map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*.lua"))
	rig.Must(t, err)
	texts := map[string]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		rig.Must(t, err)
		texts[filepath.Base(file)] = string(text)
	}
	return texts
}
